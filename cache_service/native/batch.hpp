// SGLang's KV event batches: msgpack -> hashes. The token ids are skipped unread.
//
// Decides only the plain case: a batch of which every event is known and true. Anything else is "not plain", and
// cache_service/wire/kv_events.py says what is wrong with it; so there is one place that refuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace prfaas {

struct Batch {
  enum class Type : std::uint8_t { kStored, kRemoved, kCleared };

  struct Event {
    Type type;
    bool below;  // whether there is a parent
    std::uint32_t tier;
    std::int64_t parent;
    std::size_t first, count;  // into `hashes`
  };

  double sent_unix_s = 0;
  std::vector<std::int64_t> hashes;
  std::vector<Event> events;
};

// Fills `batch` and returns true for a plain batch of the source with `dp_rank`. Bounded by `size`.
bool decode_plain(const unsigned char* data, std::size_t size, std::int64_t page_size, std::int64_t dp_rank,
                  Batch& batch);

}  // namespace prfaas
