// Batches of events: msgpack -> hashes. SGLang's own (their token ids are skipped unread), our plugin's, and the
// pages of the plugin's dumps.
//
// Decides only the plain case: a batch of which every event is known and true. Anything else is "not plain", and
// cache_service/wire/{kv,worker}_events.py say what is wrong with it; so there is one place that refuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace prfaas {

struct Batch {
  enum class Type : std::uint8_t { kStored, kRemoved, kCleared, kGroupStored, kGroupRemoved };

  struct Event {
    Type type = Type::kCleared;
    bool below = false;     // whether there is a parent
    std::uint32_t row = 0;  // held.hpp: of the tier, of a group its row there
    std::int64_t parent = 0;
    std::size_t first = 0, count = 0;  // into `hashes`
  };

  double sent_unix_s = 0;
  std::vector<std::int64_t> hashes;
  std::vector<Event> events;
  // What the worker says that its model needs; only the plugin's batches may.
  bool declared = false, needs_state = false;
  std::int64_t window_blocks = 0;
};

// The head of a page of a dump; see worker_events.DumpPage.
struct Page {
  std::int64_t dump, page, pages, seq;
  std::string_view anchor;  // in the payload
};

// Fills `batch` and returns true for a plain batch of the source with `dp_rank`. Bounded by `size`.
bool decode_plain(const unsigned char* data, std::size_t size, std::int64_t page_size, std::int64_t dp_rank,
                  Batch& batch);
bool decode_worker_batch(const unsigned char* data, std::size_t size, std::int64_t page_size,
                         std::int64_t dp_rank, Batch& batch);
bool decode_worker_page(const unsigned char* data, std::size_t size, std::int64_t page_size, Page& page,
                        Batch& batch);

}  // namespace prfaas
