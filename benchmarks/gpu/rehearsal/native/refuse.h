// How the rehearsal says that it has not got something.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <execinfo.h>

namespace rehearsal {

/// Says what was asked for, and who asked.
inline void complain(const char* what) {
  fprintf(stderr, "rehearsal: %s; asked for by\n", what);
  void* frames[40];
  backtrace_symbols_fd(frames, backtrace(frames, 40), 2);
}

/// For what has no way to tell its caller of an error.
[[noreturn]] inline void refuse(const char* what) {
  complain(what);
  abort();
}

}  // namespace rehearsal
