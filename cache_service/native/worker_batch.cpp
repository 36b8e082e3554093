// The batches and dump pages of our plugin (docs/kv-events.md); wire/worker_events.py is what they mean.
#include <algorithm>

#include "batch.hpp"
#include "held.hpp"
#include "msgpack.hpp"

namespace prfaas {

namespace {

constexpr std::int64_t kVersion = 1;
constexpr std::int64_t kMaxPages = 4096;
enum Tag : std::int64_t { kDeclared, kStored, kRemoved, kGroupStored, kGroupRemoved, kCleared };
// Elements of an event by its tag, the tag included.
constexpr size_t kLengths[] = {4, 4, 3, 4, 4, 1};

class Decoder {
 public:
  Decoder(const unsigned char* data, size_t size, std::int64_t page_size, Batch& batch)
      : in_(data, size), page_size_(page_size), batch_(batch) {}

  bool batch(std::int64_t dp_rank) {
    std::int64_t rank;
    return head(4) && in_.real(batch_.sent_unix_s) && in_.integer(rank) && rank == dp_rank && events();
  }

  bool page(Page& page) {
    return head(7) && in_.integer(page.dump) && in_.integer(page.page) && in_.integer(page.pages) &&
           in_.integer(page.seq) && in_.bytes(page.anchor) && page.page >= 0 && page.pages <= kMaxPages &&
           page.page < std::max<std::int64_t>(1, page.pages) && events();
  }

 private:
  bool head(size_t elements) {
    size_t length;
    std::int64_t version;
    return in_.array(length) && length == elements && in_.integer(version) && version == kVersion;
  }

  bool events() {
    size_t count;
    if (!in_.array(count)) return false;
    batch_.events.reserve(std::min<size_t>(count, 1024));
    while (count--)
      if (!event()) return false;
    return in_.done();
  }

  bool event() {
    size_t length;
    std::int64_t tag;
    if (!in_.array(length) || !in_.integer(tag) || tag < kDeclared || tag > kCleared) return false;
    if (length != kLengths[tag]) return false;
    if (tag == kDeclared) return declared();
    Batch::Event event;
    event.first = batch_.hashes.size();
    Kind kind = kBlock;
    if (tag == kGroupStored || tag == kGroupRemoved) {
      string_view group;
      if (!in_.text(group) || (group != "state" && group != "swa")) return false;
      kind = group == "state" ? kState : kWindow;
    }
    if (tag != kCleared && !hashes(event)) return false;
    if (tag == kStored && !parent(event)) return false;
    if (tag != kCleared) {
      std::int64_t tier;
      if (!in_.integer(tier) || tier < 0 || tier >= std::int64_t{kTiers}) return false;
      event.row = row_of(kind, static_cast<u32>(tier));
    }
    event.type = kTypes[tag];
    batch_.events.push_back(event);
    return true;
  }

  bool declared() {
    std::int64_t page_size;
    batch_.declared = true;
    return in_.integer(page_size) && page_size == page_size_ && in_.boolean(batch_.needs_state) &&
           in_.integer(batch_.window_blocks) && batch_.window_blocks >= 0;
  }

  bool hashes(Batch::Event& event) {
    string_view packed;
    if (!in_.bytes(packed) || packed.empty() || packed.size() % 8) return false;
    event.count = packed.size() / 8;
    if (event.count > kMaxBlocksPerEvent) return false;
    batch_.hashes.resize(event.first + event.count);
    std::int64_t* into = batch_.hashes.data() + event.first;
    std::memcpy(into, packed.data(), packed.size());
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (size_t i = 0; i < event.count; ++i) into[i] = static_cast<std::int64_t>(__builtin_bswap64(into[i]));
#endif
    return !duplicates_.among(into, event.count);
  }

  bool parent(Batch::Event& event) {
    if (in_.nil()) return true;
    event.below = true;
    const std::int64_t* from = batch_.hashes.data() + event.first;
    return in_.integer(event.parent) && std::find(from, from + event.count, event.parent) == from + event.count;
  }

  static constexpr Batch::Type kTypes[] = {
      Batch::Type::kCleared,     Batch::Type::kStored,       Batch::Type::kRemoved,
      Batch::Type::kGroupStored, Batch::Type::kGroupRemoved, Batch::Type::kCleared,
  };

  Reader in_;
  std::int64_t page_size_;
  Batch& batch_;
  Duplicates duplicates_;
};

}  // namespace

bool decode_worker_batch(const unsigned char* data, size_t size, std::int64_t page_size, std::int64_t dp_rank,
                         Batch& batch) {
  return Decoder(data, size, page_size, batch).batch(dp_rank);
}

bool decode_worker_page(const unsigned char* data, size_t size, std::int64_t page_size, Page& page, Batch& batch) {
  return Decoder(data, size, page_size, batch).page(page);
}

}  // namespace prfaas
