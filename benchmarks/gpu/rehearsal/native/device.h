// What the two files of the CUDA runtime share.
#pragma once

#include <cuda_runtime_api.h>

namespace rehearsal {

/// Keeps `error` for cudaGetLastError, as the runtime does, and gives it back.
cudaError_t told(cudaError_t error);

/// The calling thread's device.
int current_device();

/// Bytes of a device: REHEARSAL_BYTES, or 80 GiB.
size_t device_bytes();

}  // namespace rehearsal
