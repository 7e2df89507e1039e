// Threads: torch's own if torch is loaded, else a pool.
#pragma once

#include <functional>

namespace dybit {

// Calls work(i) for i in 0 … count-1 on up to `threads` threads, the calling one included, and returns when all are
// done. The calling thread works alone if it belongs to torch's team or the pool, or if another caller uses the pool.
void parallel_for(int count, int threads, const std::function<void(int)>& work);

}  // namespace dybit
