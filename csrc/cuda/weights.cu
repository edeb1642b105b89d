// SPDX-License-Identifier: Apache-2.0
// Surgery's T x T arithmetic on the device: one block, a thread a task.
#include "cuda/launch.cuh"
#include "weights.h"

namespace minbert {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kMaxTasks)
    pcgrad_kernel(const float* gram, const int32_t* order, int tasks, bool mean, float* w, int32_t* nonfinite) {
  __shared__ double c[kMaxTasks][kMaxTasks];
  const int task = threadIdx.x;
  if (task < tasks) {
    pcgrad_project(gram, order + task * tasks, tasks, task, c[task]);
    nonfinite[task] = !task_is_finite(gram, tasks, task);
  }
  __syncthreads();
  if (task < tasks) {
    double total = 0;
    for (int i = 0; i < tasks; ++i) total += c[i][task];
    w[task] = static_cast<float>(mean ? total / tasks : total);
  }
}

__global__ void __launch_bounds__(kMaxTasks)
    clip_kernel(const float* gram, const float* w, int tasks, const float* extra, float max_norm, float* scalars,
                float* norm) {
  __shared__ double parts[kMaxTasks];
  const int task = threadIdx.x;
  if (task < tasks) parts[task] = combined_square_part(gram, w, tasks, task);
  __syncthreads();
  if (task == 0) {
    double square = extra ? *extra : 0;
    for (int i = 0; i < tasks; ++i) square += parts[i];
    write_clip_scale(square, max_norm, scalars, norm);
  }
}

}  // namespace

void pcgrad_weights(const Where& at, const float* gram, const int32_t* order, int tasks, bool mean, float* w,
                    int32_t* nonfinite) {
  pcgrad_kernel<<<1, kMaxTasks, 0, stream(at)>>>(gram, order, tasks, mean, w, nonfinite);
  check(cudaGetLastError(), "pcgrad weights");
}

void clip_scale(const Where& at, const float* gram, const float* w, int tasks, float max_norm, const float* extra,
                float* scalars, float* norm) {
  clip_kernel<<<1, kMaxTasks, 0, stream(at)>>>(gram, w, tasks, extra, max_norm, scalars, norm);
  check(cudaGetLastError(), "clip scale");
}

}  // namespace cuda
}  // namespace minbert
