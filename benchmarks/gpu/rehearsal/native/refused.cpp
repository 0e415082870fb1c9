// What torch links against and the rehearsal has not got. The real library would take a stand-in's handle for its own.
#include <array>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "refuse.h"

namespace {

// torch asks the driver for all its functions by name, and calls few. Each is answered by one of its own that says,
// when it is called, which it is.
constexpr size_t MOST = 128;
std::array<std::string, MOST> names;
std::mutex lock;

template <size_t index>
int refused_by_name() {
  rehearsal::refuse(("the driver's " + names[index] + " is not in the rehearsal").c_str());
}

// The driver would log errors, of which it has none.
int nothing_to_log() { return 0; }

template <size_t... index>
constexpr auto answers(std::index_sequence<index...>) {
  return std::array<int (*)(), sizeof...(index)>{refused_by_name<index>...};
}

}  // namespace

extern "C" int cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                                int* status) {
  static const auto each = answers(std::make_index_sequence<MOST>());
  std::lock_guard<std::mutex> guard(lock);
  size_t i = 0;
  while (i < MOST && !names[i].empty() && names[i] != name) i++;
  if (i == MOST) rehearsal::refuse("more of the driver's functions are asked for than there is room for");
  names[i] = name;
  *found = reinterpret_cast<void*>(strncmp(name, "cuLogs", 6) == 0 ? nothing_to_log : each[i]);
  if (status) *status = 0;
  return 0;
}

#define REFUSED(name) \
  extern "C" int name() { rehearsal::refuse(#name " is not in the rehearsal"); }

REFUSED(ncclAlltoAll)
REFUSED(ncclCommGetUniqueId)
REFUSED(ncclCommGrow)
REFUSED(ncclCommInitAll)
REFUSED(ncclCommResume)
REFUSED(ncclCommRevoke)
REFUSED(ncclCommShrink)
REFUSED(ncclCommSplit)
REFUSED(ncclCommSuspend)
REFUSED(ncclCommWindowDeregister)
REFUSED(ncclCommWindowRegister)
REFUSED(ncclDevCommCreate)
REFUSED(ncclDevCommDestroy)
REFUSED(ncclGather)
REFUSED(ncclGetLsaMultimemDevicePointer)
REFUSED(ncclGetPeerDevicePointer)
REFUSED(ncclGroupSimulateEnd)
REFUSED(ncclMemAlloc)
REFUSED(ncclMemFree)
REFUSED(ncclPutSignal)
REFUSED(ncclRecv)
REFUSED(ncclScatter)
REFUSED(ncclSend)
REFUSED(ncclSignal)
REFUSED(ncclWaitSignal)
REFUSED(ncclWinGetUserPtr)
