// SPDX-License-Identifier: Apache-2.0
// One source, several instruction sets, chosen when the program runs.
//
// setup.py compiles each csrc/cpu/*.cpp once per instruction set with -DMINBERT_ISA=<name>. A kernel source defines
// everything in `namespace minbert { namespace MINBERT_ISA { ... } }`. A header declares each kernel once with
//
//     MINBERT_KERNEL(gram, (const Matrix& j, float* out, int threads))
//
// which declares minbert::portable::gram, minbert::avx2::gram, ... and defines minbert::call_gram(...), the one that
// callers use: it runs the version that fits the processor, or that MINBERT_FAST_ISA or set_isa asked for.
//
// Kernel sources use no containers of the standard library: an out-of-line std:: function compiled for AVX-512 could
// be the copy that the linker keeps for everyone. Scratch memory comes from the caller or from a local array.
#pragma once

#include <string>

#ifndef MINBERT_ISA
#define MINBERT_ISA portable  // headers used by sources that are compiled once
#endif

namespace minbert {

// portable: what the compiler assumes by itself (SSE2 on x86-64, NEON on AArch64)
// avx2: AVX2, FMA             avx512: F, BW, DQ, VL       avx512bf16: AVX-512 and its bf16 instructions
enum class Isa { portable, avx2, avx512, avx512bf16 };

Isa isa();                              // the one in use
void set_isa(const std::string& name);  // throws std::invalid_argument if this build or processor lacks it
std::string isa_name();
std::string isa_names();  // those that this build and processor have, separated by blanks, plainest first

#ifdef MINBERT_HAS_AVX2
#define MINBERT_AVX2(...) __VA_ARGS__
#else
#define MINBERT_AVX2(...)
#endif
#ifdef MINBERT_HAS_AVX512
#define MINBERT_AVX512(...) __VA_ARGS__
#else
#define MINBERT_AVX512(...)
#endif
#ifdef MINBERT_HAS_AVX512BF16
#define MINBERT_AVX512BF16(...) __VA_ARGS__
#else
#define MINBERT_AVX512BF16(...)
#endif

#define MINBERT_KERNEL(name, signature)                                       \
  namespace portable { void name signature; }                                 \
  MINBERT_AVX2(namespace avx2 { void name signature; })                       \
  MINBERT_AVX512(namespace avx512 { void name signature; })                   \
  MINBERT_AVX512BF16(namespace avx512bf16 { void name signature; })           \
  template <class... Arguments>                                               \
  void call_##name(Arguments&&... arguments) {                                \
    switch (isa()) {                                                          \
      MINBERT_AVX512BF16(case Isa::avx512bf16 : return avx512bf16::name(static_cast<Arguments&&>(arguments)...);) \
      MINBERT_AVX512(case Isa::avx512 : return avx512::name(static_cast<Arguments&&>(arguments)...);)             \
      MINBERT_AVX2(case Isa::avx2 : return avx2::name(static_cast<Arguments&&>(arguments)...);)                   \
      default: return portable::name(static_cast<Arguments&&>(arguments)...); \
    }                                                                         \
  }

}  // namespace minbert
