#include "batch.hpp"

#include <algorithm>

#include "msgpack.hpp"

namespace prfaas {

namespace {

bool tier_of(string_view medium, std::uint32_t& tier) {
  if (medium == "GPU") return tier = 0, true;
  if (medium == "CPU_PINNED" || medium == "CPU") return tier = 1, true;
  if (medium == "DISK") return tier = 2, true;
  if (medium == "EXTERNAL") return tier = 3, true;
  return false;
}

enum Field : unsigned { kType = 1, kHashes = 2, kSize = 4, kParent = 8, kMedium = 16 };

class Decoder {
 public:
  Decoder(const unsigned char* data, size_t size, std::int64_t page_size, Batch& batch)
      : in_(data, size), page_size_(page_size), batch_(batch) {}

  bool run(std::int64_t dp_rank) {
    size_t length, events;
    if (!in_.array(length) || (length != 2 && length != 3)) return false;
    if (!in_.real(batch_.sent_unix_s) || !in_.array(events)) return false;
    batch_.events.reserve(std::min<size_t>(events, 1024));
    while (events--)
      if (!event()) return false;
    std::int64_t rank;
    if (length == 3 && !in_.nil() && !(in_.integer(rank) && rank == dp_rank)) return false;
    return in_.done();
  }

 private:
  bool event() {
    Batch::Event event;
    event.first = batch_.hashes.size();
    size_t fields;
    if (!in_.map(fields)) return false;
    unsigned seen = 0;
    std::int64_t block_size = 0;
    while (fields--) {
      string_view name;
      if (!in_.text(name)) return false;
      const unsigned field = field_of(name);
      if (field & seen) return false;
      seen |= field;
      if (!value(field, event, block_size)) return false;
    }
    if (!(seen & kType)) return false;
    if (event.type == Batch::Type::kCleared) {
      batch_.hashes.resize(event.first);
    } else {
      if (!(seen & kHashes) || !event.count) return false;
      const std::int64_t* hashes = batch_.hashes.data() + event.first;
      if (duplicates_.among(hashes, event.count)) return false;
      if (event.type == Batch::Type::kStored) {
        if (!(seen & kSize) || block_size != page_size_) return false;
        for (size_t i = 0; event.below && i < event.count; ++i)
          if (hashes[i] == event.parent) return false;
      } else if (seen & (kSize | kParent)) {
        return false;  // not of this event
      }
    }
    batch_.events.push_back(event);
    return true;
  }

  static unsigned field_of(string_view name) {
    if (name == "type") return kType;
    if (name == "block_hashes") return kHashes;
    if (name == "block_size") return kSize;
    if (name == "parent_block_hash") return kParent;
    if (name == "medium") return kMedium;
    return 0;
  }

  bool value(unsigned field, Batch::Event& event, std::int64_t& block_size) {
    string_view word;
    switch (field) {
      case kType:
        if (!in_.text(word)) return false;
        if (word == "BlockStored") return event.type = Batch::Type::kStored, true;
        if (word == "BlockRemoved") return event.type = Batch::Type::kRemoved, true;
        return word == "AllBlocksCleared";
      case kHashes: {
        size_t count;
        if (!in_.array(count) || count > kMaxBlocksPerEvent) return false;
        event.count = count;
        batch_.hashes.resize(event.first + count);
        for (size_t i = 0; i < count; ++i)
          if (!in_.integer(batch_.hashes[event.first + i])) return false;
        return true;
      }
      case kSize: return in_.integer(block_size);
      case kParent:
        if (in_.nil()) return true;
        event.below = true;
        return in_.integer(event.parent);
      case kMedium: return in_.nil() || (in_.text(word) && tier_of(word, event.row));
      default: return in_.skip();
    }
  }

  Reader in_;
  std::int64_t page_size_;
  Batch& batch_;
  Duplicates duplicates_;
};

}  // namespace

bool decode_plain(const unsigned char* data, size_t size, std::int64_t page_size, std::int64_t dp_rank,
                  Batch& batch) {
  return Decoder(data, size, page_size, batch).run(dp_rank);
}

}  // namespace prfaas
