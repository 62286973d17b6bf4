// Finds races: with HALFBYTE_EMULATOR_RACES set, every access of a kernel to device memory or to
// shared memory is held against those before it. Kernels are compiled with -fsanitize=thread, whose
// calls races.cpp answers; without the variable they return at once.
//
// Reported are, of two accesses to a byte of which one writes:
// - by two groups of one launch: nothing orders groups;
// - by two threads of a group, unless a barrier of the group lies between them, or one of their warp.
// Not reported are two atomic accesses, a plain read beside atomic ones (a look whether the bit is set
// already), and two writes of the same value. A report ends the process.
//
// HALFBYTE_EMULATOR_RACES=report names what it finds and goes on. =fresh does so too, and names reads
// of shared memory that no thread of the group has written: products read the rows that a tile lacks
// and drop what comes of them, so that not all of those are wrong.
#ifndef HALFBYTE_RACES_H
#define HALFBYTE_RACES_H
#include "emulator.h"

namespace emulator {
namespace races {

bool wanted();

// Device memory, from its allocation until it is freed.
void allocated(const void* start, size_t bytes);
void freed(const void* start);

// A launch whose groups run one after the other on this host thread.
void begin(const char* kernel, dim3_ groups, const char* shared, size_t shared_bytes);
void end();
void begin_group(uint64_t number);

// Who accesses memory from now on: a thread of the group, after so many barriers of its group and of
// its warp. Nobody between `leave` and the next `enter`.
void enter(unsigned thread, unsigned group_barriers, unsigned warp_barriers);
void leave();

} // namespace races
} // namespace emulator

#endif
