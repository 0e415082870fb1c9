// A CUDA runtime without a GPU: devices, streams and events. A kernel is an error. Memory: memory.cpp.
#include "device.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "refuse.h"

namespace {

// Of CUDA 13.2. As large as torch may be built for: it only has to be no older than the runtime.
constexpr int VERSION = 13020;

thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;

struct Event {
  double milliseconds;
};

int device_count() {
  const char* text = getenv("REHEARSAL_GPUS");
  return text ? atoi(text) : 1;
}

double now() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Event* event_of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }

cudaError_t launched() {
  rehearsal::complain("a kernel was launched, and there is no GPU: its operator has to be in operators.cpp");
  return rehearsal::told(cudaErrorNoKernelImageForDevice);
}

}  // namespace

namespace rehearsal {

cudaError_t told(cudaError_t error) {
  last = error;
  return error;
}

int current_device() { return current; }

}  // namespace rehearsal

// Calls that have nothing to do where all is done when the call returns.
#define NOTHING(name, ...)        \
  cudaError_t name(__VA_ARGS__) { \
    return cudaSuccess;           \
  }

extern "C" {

/// Tells that this runtime was loaded, and no other.
void rehearsal_runtime() {}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return rehearsal::told(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "a kernel was launched in a rehearsal, where there is no GPU";
    default: return "what was asked for is not in the rehearsal (benchmarks/gpu/rehearsal/native)";
  }
}

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}

// An H100's, as far as torch asks.
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  memset(found, 0, sizeof *found);
  snprintf(found->name, sizeof found->name, "Rehearsal");
  found->totalGlobalMem = rehearsal::device_bytes();
  found->major = 9;
  found->multiProcessorCount = 132;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->sharedMemPerBlock = 48 << 10;
  found->sharedMemPerBlockOptin = 227 << 10;
  found->sharedMemPerMultiprocessor = 228 << 10;
  found->regsPerBlock = 64 << 10;
  found->l2CacheSize = 50 << 20;
  found->textureAlignment = 512;
  for (int i = 0; i < 3; i++) {
    found->maxThreadsDim[i] = i < 2 ? 1024 : 64;
    found->maxGridSize[i] = i ? 65535 : INT32_MAX;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    // Of a feature: the device has not got it.
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  snprintf(text, length, "0000:%02x:00.0", device);
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

NOTHING(cudaDeviceEnablePeerAccess, int, unsigned)
NOTHING(cudaDeviceSynchronize)
NOTHING(cudaProfilerStart)
NOTHING(cudaProfilerStop)

// A stream is a name: its work is done at once, in the order of the calls.
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* made, unsigned, int) {
  static std::atomic<uintptr_t> names{0x100};
  *made = reinterpret_cast<cudaStream_t>(names.fetch_add(1));
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* made) { return cudaStreamCreateWithPriority(made, 0, 0); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned) { return cudaStreamCreate(made); }

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

NOTHING(cudaStreamDestroy, cudaStream_t)
NOTHING(cudaStreamQuery, cudaStream_t)
NOTHING(cudaStreamSynchronize, cudaStream_t)
NOTHING(cudaStreamWaitEvent, cudaStream_t, cudaEvent_t, unsigned)
NOTHING(cudaThreadExchangeStreamCaptureMode, cudaStreamCaptureMode*)

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// Where nothing is captured, the runtime leaves the other results as they are.
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
  call(stream, cudaSuccess, data);
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* data) {
  call(data);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* made) {
  *made = reinterpret_cast<cudaEvent_t>(new Event{now()});
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned) { return cudaEventCreate(made); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event_of(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event_of(event)->milliseconds = now();
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = static_cast<float>(event_of(to)->milliseconds - event_of(from)->milliseconds);
  return cudaSuccess;
}

NOTHING(cudaEventQuery, cudaEvent_t)
NOTHING(cudaEventSynchronize, cudaEvent_t)

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return launched(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return launched(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return launched(); }
cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return launched(); }

}  // extern "C"
