// NCCL between the processes of one machine: sums are in the order of the ranks, in double precision.
#include <nccl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <sys/random.h>
#include <vector>

#include "device.h"
#include "group.h"
#include "refuse.h"

using rehearsal::Group;

namespace {

// Operations that torch makes: a sum of what each process has, times a factor of its own.
std::vector<double> factors;
std::mutex lock;

Group* group_of(ncclComm_t comm) { return reinterpret_cast<Group*>(comm); }

size_t width(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt32:
    case ncclFloat32: return 4;
    case ncclInt64:
    case ncclFloat64: return 8;
    default: rehearsal::refuse("a collective of this type of number is not in the rehearsal");
  }
}

double factor_of(ncclRedOp_t operation) {
  std::lock_guard<std::mutex> guard(lock);
  size_t index = static_cast<size_t>(operation) - ncclNumOps;
  if (index >= factors.size()) rehearsal::refuse("a reduction that nobody made");
  return factors[index];
}

double joined(double left, double right, ncclRedOp_t operation) {
  // What is no number stays none.
  if (std::isnan(left)) return left;
  switch (operation) {
    case ncclProd: return left * right;
    case ncclMax: return right < left ? left : right;
    case ncclMin: return right > left ? left : right;
    default: return left + right;
  }
}

template <class Number>
void reduce_as(const Group& group, size_t offset, void* to, size_t count, ncclRedOp_t operation) {
  double factor = operation < ncclNumOps ? 1 : factor_of(operation);
  for (size_t i = 0; i < count; i++) {
    double total = 0;
    for (int rank = 0; rank < group.ranks; rank++) {
      Number number;
      memcpy(&number, group.slot(rank) + offset + i * sizeof number, sizeof number);
      double value = static_cast<double>(number) * factor;
      total = rank ? joined(total, value, operation) : value;
    }
    auto number = static_cast<Number>(operation == ncclAvg ? total / group.ranks : total);
    memcpy(static_cast<char*>(to) + i * sizeof number, &number, sizeof number);
  }
}

// At `offset` bytes of every process's slot.
void reduce(const Group& group, size_t offset, void* to, size_t count, ncclDataType_t type, ncclRedOp_t operation) {
  switch (type) {
    case ncclInt8: return reduce_as<int8_t>(group, offset, to, count, operation);
    case ncclUint8: return reduce_as<uint8_t>(group, offset, to, count, operation);
    case ncclInt32: return reduce_as<int32_t>(group, offset, to, count, operation);
    case ncclFloat16: return reduce_as<_Float16>(group, offset, to, count, operation);
    case ncclBfloat16: return reduce_as<__nv_bfloat16>(group, offset, to, count, operation);
    case ncclFloat32: return reduce_as<float>(group, offset, to, count, operation);
    case ncclFloat64: return reduce_as<double>(group, offset, to, count, operation);
    // Beyond 2^53 a double is not exact: torch's are counts and flags.
    case ncclInt64: return reduce_as<int64_t>(group, offset, to, count, operation);
    default: rehearsal::refuse("a reduction of this type of number is not in the rehearsal");
  }
}

/// In pieces of at most `most` elements, from `first` on: `hand` writes this process's slot, `take` reads all.
template <class Hand, class Take>
ncclResult_t exchanged(Group& group, const rehearsal::Asked& asked, size_t most, Hand hand, Take take) {
  if (!group.agree(asked)) return ncclRemoteError;
  for (size_t first = 0; first < asked.count; first += most) {
    size_t count = std::min(most, asked.count - first);
    hand(first, count);
    if (!group.meet()) return ncclRemoteError;
    take(first, count);
    if (!group.meet()) return ncclRemoteError;
  }
  return ncclSuccess;
}

ncclResult_t reduced(const char* call, const void* from, void* to, size_t total, ncclDataType_t type,
                     ncclRedOp_t operation, int root, ncclComm_t comm) {
  Group& group = *group_of(comm);
  size_t bytes = width(type);
  auto hand = [&](size_t first, size_t count) {
    memcpy(group.own(), static_cast<const char*>(from) + first * bytes, count * bytes);
  };
  auto take = [&](size_t first, size_t count) {
    if (root >= 0 && root != group.rank) return;
    reduce(group, 0, static_cast<char*>(to) + first * bytes, count, type, operation);
  };
  return exchanged(group, {call, total, type, operation, root}, Group::SLOT / bytes, hand, take);
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t error) {
  return error == ncclSuccess ? "no error" : "another process of the rehearsal's group has left";
}

const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  memset(id, 0, sizeof *id);
  return getrandom(id->internal, 16, 0) == 16 ? ncclSuccess : ncclSystemError;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* made, int ranks, ncclUniqueId id, int rank, ncclConfig_t*) {
  std::string name;
  for (int i = 0; i < 16; i++) {
    char digits[3];
    snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(id.internal[i]));
    name += digits;
  }
  auto group = Group::join(name, ranks, rank, rehearsal::current_device());
  *made = reinterpret_cast<ncclComm_t>(group);
  return group ? ncclSuccess : ncclSystemError;
}

ncclResult_t ncclCommInitRank(ncclComm_t* made, int ranks, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(made, ranks, id, rank, nullptr);
}

ncclResult_t ncclCommInitRankScalable(ncclComm_t* made, int ranks, int rank, int, ncclUniqueId* ids,
                                      ncclConfig_t* config) {
  return ncclCommInitRankConfig(made, ranks, ids[0], rank, config);
}

ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  delete group_of(comm);
  return ncclSuccess;
}

// Another thread may still be in a collective, which this ends: so its group stays.
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  group_of(comm)->leave();
  return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
  *error = ncclSuccess;
  return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  *count = group_of(comm)->ranks;
  return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  *rank = group_of(comm)->rank;
  return ncclSuccess;
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device) {
  *device = group_of(comm)->device;
  return ncclSuccess;
}

// Memory that is made known to NCCL is only sooner reached.
ncclResult_t ncclCommRegister(const ncclComm_t, void*, size_t, void** handle) {
  *handle = nullptr;
  return ncclSuccess;
}

ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }

ncclResult_t ncclCommMemStats(ncclComm_t, ncclCommMemStat_t, uint64_t* value) {
  *value = 0;
  return ncclSuccess;
}

// Each collective is over when its call returns, so all processes have to call a group's in the same order.
ncclResult_t ncclGroupStart() { return ncclSuccess; }
ncclResult_t ncclGroupEnd() { return ncclSuccess; }

ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* made, void* scalar, ncclDataType_t type, ncclScalarResidence_t,
                                      ncclComm_t) {
  double factor;
  switch (type) {
    case ncclFloat64: factor = *static_cast<double*>(scalar); break;
    case ncclFloat32: factor = *static_cast<float*>(scalar); break;
    case ncclFloat16: factor = static_cast<double>(*static_cast<_Float16*>(scalar)); break;
    case ncclBfloat16: factor = static_cast<double>(*static_cast<__nv_bfloat16*>(scalar)); break;
    default: rehearsal::refuse("a factor of this type of number is not in the rehearsal");
  }
  std::lock_guard<std::mutex> guard(lock);
  *made = static_cast<ncclRedOp_t>(ncclNumOps + factors.size());
  factors.push_back(factor);
  return ncclSuccess;
}

ncclResult_t ncclRedOpDestroy(ncclRedOp_t, ncclComm_t) { return ncclSuccess; }

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t operation,
                           ncclComm_t comm, cudaStream_t) {
  return reduced("all-reduce", from, to, count, type, operation, -1, comm);
}

ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t operation, int root,
                        ncclComm_t comm, cudaStream_t) {
  return reduced("reduce", from, to, count, type, operation, root, comm);
}

ncclResult_t ncclReduceScatter(const void* from, void* to, size_t total, ncclDataType_t type, ncclRedOp_t operation,
                               ncclComm_t comm, cudaStream_t) {
  Group& group = *group_of(comm);
  size_t bytes = width(type);
  size_t most = Group::SLOT / bytes / group.ranks;
  auto hand = [&](size_t first, size_t count) {
    for (int rank = 0; rank < group.ranks; rank++) {
      const char* part = static_cast<const char*>(from) + (rank * total + first) * bytes;
      memcpy(group.own() + rank * most * bytes, part, count * bytes);
    }
  };
  auto take = [&](size_t first, size_t count) {
    reduce(group, group.rank * most * bytes, static_cast<char*>(to) + first * bytes, count, type, operation);
  };
  return exchanged(group, {"reduce-scatter", total, type, operation, -1}, most, hand, take);
}

ncclResult_t ncclAllGather(const void* from, void* to, size_t total, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t) {
  Group& group = *group_of(comm);
  size_t bytes = width(type);
  auto hand = [&](size_t first, size_t count) {
    memcpy(group.own(), static_cast<const char*>(from) + first * bytes, count * bytes);
  };
  auto take = [&](size_t first, size_t count) {
    for (int rank = 0; rank < group.ranks; rank++) {
      memcpy(static_cast<char*>(to) + (rank * total + first) * bytes, group.slot(rank), count * bytes);
    }
  };
  return exchanged(group, {"all-gather", total, type, 0, -1}, Group::SLOT / bytes, hand, take);
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t total, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t) {
  Group& group = *group_of(comm);
  size_t bytes = width(type);
  auto hand = [&](size_t first, size_t count) {
    if (group.rank == root) memcpy(group.own(), static_cast<const char*>(from) + first * bytes, count * bytes);
  };
  auto take = [&](size_t first, size_t count) {
    memcpy(static_cast<char*>(to) + first * bytes, group.slot(root), count * bytes);
  };
  return exchanged(group, {"broadcast", total, type, 0, root}, Group::SLOT / bytes, hand, take);
}

ncclResult_t ncclBcast(void* data, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  return ncclBroadcast(data, data, count, type, root, comm, stream);
}

}  // extern "C"
