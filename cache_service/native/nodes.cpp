#include "nodes.hpp"

#include <cstring>
#include <stdexcept>

namespace prfaas {

Nodes::Nodes() : tags_(64, 0), places_(64, 0), mask_(63) {}

Nodes::Nodes(const Nodes& other)
    : tags_(other.tags_),
      places_(other.places_),
      mask_(other.mask_),
      count_(other.count_),
      end_(other.end_),
      free_(other.free_) {
  chunks_.reserve(other.chunks_.size());
  for (const auto& chunk : other.chunks_) {
    chunks_.emplace_back(new Node[kChunk]);
    std::memcpy(chunks_.back().get(), chunk.get(), kChunk * sizeof(Node));
  }
}

u32 Nodes::find_or_make(i64 hash) {
  const u32 found = find(hash);
  if (found != kNone) return found;
  u32 index = free_;
  if (index != kNone) {
    free_ = (*this)[index].next;
  } else {
    if (end_ >= 0xF0000000u) throw std::length_error("more than 4e9 blocks");
    index = end_++;
    if (index >> kBits == chunks_.size()) {
      chunks_.emplace_back(new Node[kChunk]);
      // Never read before it is written, but copied whole.
      std::memset(static_cast<void*>(chunks_.back().get()), 0, kChunk * sizeof(Node));
    }
  }
  (*this)[index] = Node{hash, kNone, kNone, kNone, kNone, kNobody};
  if ((std::size_t{++count_} * 5) > places_.size() * 4)
    grow();
  else
    put(mix(hash), index);
  return index;
}

void Nodes::free(u32 index) {
  Node& node = (*this)[index];
  std::size_t hole = mix(node.hash) & mask_;
  while (!tags_[hole] || places_[hole] != index) hole = (hole + 1) & mask_;
  // No tombstones: what was pushed past the hole moves back into it.
  for (std::size_t at = (hole + 1) & mask_; tags_[at]; at = (at + 1) & mask_) {
    const std::size_t wanted = mix((*this)[places_[at]].hash) & mask_;
    if (((at - wanted) & mask_) >= ((at - hole) & mask_)) {
      tags_[hole] = tags_[at];
      places_[hole] = places_[at];
      hole = at;
    }
  }
  tags_[hole] = 0;
  node.prev = kFreed;
  node.next = free_;
  free_ = index;
  --count_;
}

void Nodes::link(u32 index, u32 parent) {
  Node& node = (*this)[index];
  node.parent = parent;
  node.prev = node.next = kNone;
  if (parent == kRoot) return;
  Node& above = (*this)[parent];
  node.next = above.child;
  if (above.child != kNone) (*this)[above.child].prev = index;
  above.child = index;
}

u32 Nodes::unlink(u32 index) {
  Node& node = (*this)[index];
  const u32 parent = node.parent;
  if (parent != kRoot) {
    if (node.prev != kNone)
      (*this)[node.prev].next = node.next;
    else
      (*this)[parent].child = node.next;
    if (node.next != kNone) (*this)[node.next].prev = node.prev;
  }
  node.parent = node.prev = node.next = kNone;
  return parent;
}

void Nodes::grow() {
  // Everything anew: the table holds the nodes in use, the one just made included.
  tags_.assign(tags_.size() * 2, 0);
  places_.assign(places_.size() * 2, 0);
  mask_ = places_.size() - 1;
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
