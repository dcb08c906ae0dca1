#include "platform/pool.h"

#include <cstdint>
#include <vector>

#include "platform/buffer.h"
#include "platform/lock.h"

namespace effnet {
namespace {

// A block is used for requests of at least this fraction of its size.
constexpr double least_fraction = 0.875;
// A block that was free during so many requests is returned to the system.
constexpr std::int64_t patience = 4096;

Buffer allocate_bytes(std::size_t bytes) {
  return allocate(static_cast<std::int64_t>((bytes + sizeof(float) - 1) / sizeof(float)));
}

class Pool {
 public:
  Block acquire(std::size_t bytes) {
    Free taken{nullptr, 0, 0};
    std::vector<Free> stale;
    {
      const Lock lock;
      ++requests_;
      std::size_t best = free_.size();
      for (std::size_t i = 0; i < free_.size(); ++i) {
        const std::size_t size = free_[i].bytes;
        if (size < bytes || static_cast<double>(bytes) < least_fraction * static_cast<double>(size)) continue;
        if (best == free_.size() || size < free_[best].bytes) best = i;
      }
      if (best < free_.size()) taken = take(best);
      for (std::size_t i = free_.size(); i-- > 0;) {
        if (requests_ - free_[i].since > patience) stale.push_back(take(i));
      }
    }
    if (taken.memory == nullptr) taken = {allocate_bytes(bytes), bytes, 0};
    float* memory = taken.memory.get();
    auto owner = std::make_shared<Owner>(*this, std::move(taken));
    return Block(std::move(owner), memory);
  }

  void release() {
    std::vector<Free> all;
    const Lock lock;
    all.swap(free_);
  }

 private:
  struct Free {
    Buffer memory;
    std::size_t bytes;
    std::int64_t since;  // the number of requests before it was put back
  };

  struct Owner {
    Pool& pool;
    Free block;
    Owner(Pool& pool, Free&& block) : pool(pool), block(std::move(block)) {}
    ~Owner() { pool.put_back(std::move(block)); }
  };

  Free take(std::size_t index) {
    Free block = std::move(free_[index]);
    free_[index] = std::move(free_.back());
    free_.pop_back();
    return block;
  }

  void put_back(Free&& block) {
    const Lock lock;
    block.since = requests_;
    free_.push_back(std::move(block));
  }

  std::vector<Free> free_;
  std::int64_t requests_ = 0;
};

// Never destroyed: tensors may outlive every other static object.
Pool& pool() {
  static Pool& pool = *new Pool;
  return pool;
}

}  // namespace

Block acquire(std::size_t bytes) {
  if constexpr (address_sanitizer) return allocate_bytes(bytes);
  return pool().acquire(bytes);
}

void release_memory() { pool().release(); }

}  // namespace effnet
