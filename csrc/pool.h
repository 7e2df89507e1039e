// A few threads that wait for work. Must not know what the work is.
#pragma once

#include <functional>

namespace dybit {

// Calls work(i) for i in 0 … count-1 on up to `threads` threads, this one included, and returns when all are done.
// While another caller uses the pool, and in a pool's own threads, the work runs on the calling thread alone.
void parallel_for(int count, int threads, const std::function<void(int)>& work);

}  // namespace dybit
