# SPDX-License-Identifier: Apache-2.0
"""MkDocs hook: search works when the built site is opened from disk, without loading a script from the network.

Browsers do not start a Worker from a file:// page. The `offline` plugin loads a substitute from another site. This hook
replaces it with an inline one, which runs the search worker in a hidden frame.
"""

from __future__ import annotations

import re
from typing import Any

_NETWORK = re.compile(r'<script src="?https://unpkg\.com/iframe-worker/shim"?></script>')

_INLINE = """<script>
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.scope = frame.contentWindow
      this.scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = frame.contentDocument.createElement("script")
      script.src = address
      this.loaded = new Promise(resolve => script.addEventListener("load", resolve))
      frame.contentDocument.body.append(script)
    }
    postMessage(data) {
      this.loaded.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
</script>"""


def on_post_page(output: str, **_: Any) -> str:
    """The page with the inline substitute."""
    page, count = _NETWORK.subn(lambda _: _INLINE, output)
    if count != 1:
        raise ValueError(f"expected one script of iframe-worker on the page, found {count}")
    return page


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for pages without a Markdown file (404)."""
    return _NETWORK.sub(lambda _: _INLINE, output_content)
