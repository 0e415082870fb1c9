// Processes of one machine that meet, and read what the others hand over.
#include "group.h"

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "refuse.h"

namespace rehearsal {

namespace {

constexpr int MOST_RANKS = 16;
constexpr auto PATIENCE = std::chrono::minutes(10);

// Names are addresses, which differ between processes.
struct Note {
  char call[24];
  size_t count;
  int type;
  int operation;
  int root;
};

}  // namespace

struct Group::Shared {
  std::atomic<int> arrived;
  std::atomic<int> turn;
  std::atomic<int> gone;
  Note notes[MOST_RANKS];
};

size_t Group::bytes(int ranks) { return 4096 + ranks * SLOT; }

Group::Group(int ranks, int rank, int device, void* memory)
    : ranks(ranks), rank(rank), device(device), shared_(static_cast<Shared*>(memory)) {
  static_assert(sizeof(Shared) <= 4096);
  slots_ = static_cast<char*>(memory) + 4096;
}

Group::~Group() { munmap(shared_, bytes(ranks)); }

Group* Group::join(const std::string& name, int ranks, int rank, int device) {
  if (ranks > MOST_RANKS) refuse("a group of more than 16 processes is not in the rehearsal");
  std::string path = "/dev/shm/rehearsal_" + name;
  int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
  // Its memory is taken at once: to write where there is none would end the process without a word.
  int error = file < 0 ? errno : posix_fallocate(file, 0, bytes(ranks));
  void* memory = MAP_FAILED;
  if (!error) {
    memory = mmap(nullptr, bytes(ranks), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) error = errno;
  }
  if (file >= 0) close(file);
  if (error) refuse((path + ", through which processes talk: " + strerror(error)).c_str());
  auto group = new Group(ranks, rank, device, memory);
  bool all = group->meet();
  // All have it open: the name is no longer needed, and nothing stays behind.
  if (rank == 0) unlink(path.c_str());
  if (all) return group;
  delete group;
  return nullptr;
}

bool Group::meet() {
  int turn = shared_->turn.load();
  if (shared_->arrived.fetch_add(1) + 1 == ranks) {
    shared_->arrived.store(0);
    shared_->turn.fetch_add(1);
    return true;
  }
  auto end = std::chrono::steady_clock::now() + PATIENCE;
  while (shared_->turn.load() == turn) {
    if (shared_->gone.load()) return false;
    if (std::chrono::steady_clock::now() > end) refuse("another process has not come to a collective for 10 minutes");
    usleep(200);
  }
  return true;
}

bool Group::agree(const Asked& asked) {
  Note note;
  // The bytes between its fields too: notes are compared whole.
  memset(&note, 0, sizeof note);
  strncpy(note.call, asked.call, sizeof note.call - 1);
  note.count = asked.count;
  note.type = asked.type;
  note.operation = asked.operation;
  note.root = asked.root;
  shared_->notes[rank] = note;
  if (!meet()) return false;
  for (int other = 0; other < ranks; other++) {
    if (memcmp(&shared_->notes[other], &note, sizeof note) != 0) {
      refuse("the processes of a group ask for different collectives, or of different sizes or types");
    }
  }
  // Nobody writes its next note before all have read these.
  return meet();
}

void Group::leave() { shared_->gone.store(1); }

}  // namespace rehearsal
