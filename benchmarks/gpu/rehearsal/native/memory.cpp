// The devices' memory, which is this machine's.
#include "device.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sys/mman.h>

namespace {

struct Block {
  size_t bytes;
  int device;
  bool host;
};

std::mutex lock;
std::map<char*, Block> blocks;
constexpr int MOST_DEVICES = 64;
std::atomic<size_t> held[MOST_DEVICES];

// Ghosts (ghosts.h) never write what they allocate, so more can be had than the machine has.
bool ghosts() {
  static bool asked = getenv("REHEARSAL_GHOST") != nullptr;
  return asked;
}

bool reserved(void** found, size_t bytes) {
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  *found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  return *found != MAP_FAILED;
}

cudaError_t take(void** found, size_t bytes, bool host) {
  int device = rehearsal::current_device();
  if (!host && held[device] + bytes > rehearsal::device_bytes()) return rehearsal::told(cudaErrorMemoryAllocation);
  bool ghost = ghosts() && !host;
  // As a device's memory is aligned.
  bool taken = ghost ? reserved(found, bytes) : posix_memalign(found, 512, bytes ? bytes : 1) == 0;
  if (!taken) return rehearsal::told(cudaErrorMemoryAllocation);
  if (!host) held[device] += bytes;
  // Not a number in every floating-point type: what is read before it is written shows.
  if (!host && !ghost) memset(*found, 0xFF, bytes);
  std::lock_guard<std::mutex> guard(lock);
  blocks[static_cast<char*>(*found)] = {bytes, device, host};
  return cudaSuccess;
}

cudaError_t give(void* pointer) {
  if (!pointer) return cudaSuccess;
  std::lock_guard<std::mutex> guard(lock);
  auto found = blocks.find(static_cast<char*>(pointer));
  if (found == blocks.end()) return rehearsal::told(cudaErrorInvalidValue);
  Block block = found->second;
  if (!block.host) held[block.device] -= block.bytes;
  if (ghosts() && !block.host) {
    munmap(pointer, block.bytes);
  } else {
    free(pointer);
  }
  blocks.erase(found);
  return cudaSuccess;
}

cudaError_t moved(void* to, const void* from, size_t bytes) {
  memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t filled(void* to, int value, size_t bytes) {
  memset(to, value, bytes);
  return cudaSuccess;
}

}  // namespace

size_t rehearsal::device_bytes() {
  const char* text = getenv("REHEARSAL_BYTES");
  return text ? strtoull(text, nullptr, 10) : 80ull << 30;
}

extern "C" {

cudaError_t cudaMalloc(void** found, size_t bytes) { return take(found, bytes, false); }
cudaError_t cudaFree(void* pointer) { return give(pointer); }
cudaError_t cudaHostAlloc(void** found, size_t bytes, unsigned) { return take(found, bytes, true); }
cudaError_t cudaMallocHost(void** found, size_t bytes) { return take(found, bytes, true); }
cudaError_t cudaFreeHost(void* pointer) { return give(pointer); }
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t* unused, size_t* all) {
  *all = rehearsal::device_bytes();
  *unused = *all - held[rehearsal::current_device()];
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  std::lock_guard<std::mutex> guard(lock);
  char* asked = static_cast<char*>(const_cast<void*>(pointer));
  auto after = blocks.upper_bound(asked);
  if (after == blocks.begin()) return cudaSuccess;
  const auto& [begin, block] = *--after;
  if (asked >= begin + block.bytes) return cudaSuccess;
  found->type = block.host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  found->device = block.device;
  found->devicePointer = asked;
  found->hostPointer = block.host ? asked : nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return moved(to, from, bytes); }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return moved(to, from, bytes);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t) {
  return moved(to, from, bytes);
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) { return filled(to, value, bytes); }

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return filled(to, value, bytes); }

}  // extern "C"
