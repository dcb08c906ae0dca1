#include "operators/fingerprint.h"

#include <algorithm>

#include "platform/parallel.h"

namespace effnet {
namespace {

// A part that one thread hashes. Its size decides the hash, too.
constexpr std::int64_t part_bytes = 64 * 1024;
// Below it, threads take longer to begin than to hash.
constexpr std::int64_t shared_bytes = 256 * 1024;

// An odd factor, and so a bijection of 64 bits.
constexpr std::uint64_t factor = 0x9e3779b97f4a7c15u;

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
  hash = (hash ^ value) * factor;
  return hash ^ hash >> 32;
}

}  // namespace

std::uint64_t fingerprint(const std::vector<Bytes>& memory, const Execution& execution) {
  std::vector<Bytes> parts;
  std::int64_t total = 0;
  for (const Bytes& bytes : memory) {
    total += bytes.count;
    for (std::int64_t begin = 0; begin < bytes.count; begin += part_bytes) {
      parts.push_back({static_cast<const char*>(bytes.data) + begin, std::min(part_bytes, bytes.count - begin)});
    }
  }
  std::vector<std::uint64_t> hashes(parts.size());
  parallel_team(total < shared_bytes ? 1 : execution.threads, [&](Team& team) {
    const std::size_t index = static_cast<std::size_t>(team.index()), count = static_cast<std::size_t>(team.count());
    for (std::size_t i = parts.size() * index / count; i < parts.size() * (index + 1) / count; ++i) {
      hashes[i] = execution.kernels.hash(parts[i].data, parts[i].count);
    }
  });
  std::uint64_t hash = 0;
  for (const std::uint64_t part : hashes) hash = mix(hash, part);
  return hash;
}

}  // namespace effnet
