// Processes of one machine that exchange data through a file in shared memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <string>

namespace rehearsal {

/// What a process asks of a collective: all of a group have to ask the same.
struct Asked {
  const char* call;
  size_t count;
  int type;
  int operation;
  int root;
};

class Group {
 public:
  /// Bytes that a process can hand over at once.
  static constexpr size_t SLOT = 8u << 20;

  /// Waits for all `ranks` processes; gives none where one has left. Ends the process where the file cannot be made.
  static Group* join(const std::string& name, int ranks, int rank, int device);
  ~Group();

  /// Waits until all have come here; false where one has left the group. Ends the process after ten minutes.
  bool meet();
  /// Whether all ask the same; ends the process where they do not. False as `meet`.
  bool agree(const Asked& asked);
  void leave();

  /// What process `rank` hands over.
  char* slot(int rank) const { return slots_ + rank * SLOT; }
  char* own() const { return slot(rank); }

  const int ranks;
  const int rank;
  const int device;

 private:
  struct Shared;
  Group(int ranks, int rank, int device, void* memory);
  static size_t bytes(int ranks);

  Shared* shared_;
  char* slots_;
};

}  // namespace rehearsal
