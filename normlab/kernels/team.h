// Threads for the length of one call, and the groups of samples that a call is about.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace normlab {

// Samples k * group + i * sample, for k below groups and i below samples, each with `channels`
// channels of `positions` elements. Steps are counted in samples.
struct Shape {
    int64_t channels, positions, groups, samples, group, sample;
};

// Bytes that two passes of one thread find in its cache, and bytes worth a thread.
constexpr int64_t CACHED = 192 << 10;
// The same where all cores share the cache.
constexpr int64_t SHARED = 4 << 20;
// Bytes of a result that no cache holds until its reader comes.
constexpr int64_t PAST = 32 << 20;
constexpr int64_t WORTH_A_THREAD = 512 << 10;

// Threads that run one function together. Who does what depends on their number, what is computed
// does not: no sum is taken over threads.
class Team {
  public:
    template <class Work> static void run(int64_t wanted, int64_t bytes, Work work) {
        int size = (int)std::max<int64_t>(1, std::min(wanted, bytes / WORTH_A_THREAD));
        Team team;
        std::vector<std::thread> others;
        if (size > 1) {
            others.reserve(size - 1);
            try {
                while ((int)others.size() < size - 1) {
                    int member = (int)others.size() + 1;
                    others.emplace_back([&team, &work, member] {
                        team.await_start();
                        work(team, member);
                    });
                }
            } catch (const std::system_error&) {  // fewer, then
            }
        }
        team.start((int)others.size() + 1);
        work(team, 0);
        for (auto& other : others) other.join();
    }

    int64_t size() const { return size_; }

    void meet() {
        if (size_ == 1) return;
        std::unique_lock<std::mutex> lock(mutex_);
        int64_t round = round_;
        if (++waiting_ == size_) {
            waiting_ = 0;
            ++round_;
            changed_.notify_all();
        } else {
            changed_.wait(lock, [&] { return round_ != round; });
        }
    }

  private:
    void start(int size) {
        std::lock_guard<std::mutex> lock(mutex_);
        size_ = size;
        changed_.notify_all();
    }

    void await_start() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return size_ > 0; });
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    int size_ = 0, waiting_ = 0;
    int64_t round_ = 0;
};

}  // namespace normlab
