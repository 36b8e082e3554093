#include "nodes.hpp"

#include <stdexcept>

namespace prfaas {

Nodes::Nodes() : tags_(64, 0), places_(64, 0), mask_(63) {}

u32 Nodes::find_or_make(i64 hash, u32 guess) {
  if (guess < end_ && (*this)[guess].hash == hash && live(guess)) return guess;
  const u64 mixed = mix(hash);
  const std::uint8_t tag = tag_of(mixed);
  std::size_t at = mixed & mask_;
  std::size_t place = ~std::size_t{0};  // the first that was taken
  for (; tags_[at]; at = (at + 1) & mask_) {
    if (tags_[at] == tag && (*this)[places_[at]].hash == hash) return places_[at];
    if (tags_[at] == kGone && place == ~std::size_t{0}) place = at;
  }
  u32 index = free_;
  if (index != kNone) {
    free_ = (*this)[index].next;
  } else {
    if (end_ >= 0xF0000000u) throw std::length_error("more than 4e9 blocks");
    index = end_++;
    nodes_.cover(index);
  }
  (*this)[index] = Node{hash, kNone, kNone, kNone, kNone, kNobody};
  ++count_;
  if (place != ~std::size_t{0})
    at = place, --gone_;
  else if ((std::size_t{count_} + gone_) * 5 > places_.size() * 4)
    return rebuild(), index;
  tags_[at] = tag;
  places_[at] = index;
  return index;
}

void Nodes::free(u32 index) {
  Node& node = (*this)[index];
  const u64 mixed = mix(node.hash);
  const std::uint8_t tag = tag_of(mixed);
  std::size_t at = mixed & mask_;
  while (tags_[at] != tag || places_[at] != index) at = (at + 1) & mask_;
  if (tags_[(at + 1) & mask_]) {
    tags_[at] = kGone;
    ++gone_;
  } else {
    tags_[at] = 0;
    while (tags_[at = (at - 1) & mask_] == kGone) tags_[at] = 0, --gone_;
  }
  node.prev = kFreed;
  node.next = free_;
  free_ = index;
  --count_;
}

void Nodes::clear() {
  nodes_.clear();
  tags_.assign(64, 0);
  tags_.shrink_to_fit();
  places_.assign(64, 0);
  places_.shrink_to_fit();
  mask_ = 63;
  count_ = gone_ = end_ = 0;
  free_ = kNone;
}

void Nodes::rebuild() {
  // Everything anew: the table holds the nodes in use, the one just made included.
  std::size_t capacity = places_.size();
  if (std::size_t{count_} * 2 > capacity) capacity *= 2;
  tags_.assign(capacity, 0);
  places_.assign(capacity, 0);
  mask_ = capacity - 1;
  gone_ = 0;
  for (u32 index = 0; index < end_; ++index)
    if (live(index)) put(mix((*this)[index].hash), index);
}

void Nodes::put(u64 mixed, u32 index) {
  std::size_t at = mixed & mask_;
  while (tags_[at]) at = (at + 1) & mask_;
  tags_[at] = tag_of(mixed);
  places_[at] = index;
}

}  // namespace prfaas
