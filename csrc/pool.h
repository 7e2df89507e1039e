// Threads for pieces of work: torch's own, or a few that wait. Must not know what the work is.
#pragma once

#include <functional>

namespace dybit {

// Calls work(i) for i in 0 … count-1 on up to `threads` threads, this one included, and returns when all are done.
// In torch's threads, in a pool's own, and while another caller uses the pool, the work runs on the calling thread alone.
void parallel_for(int count, int threads, const std::function<void(int)>& work);

}  // namespace dybit
