// The blocks by hash, and which hangs below which.
//
// A node lives while its block is held, has a group entry, or has a child that is held. Only a held block is
// linked to its parent; what it hangs below is forgotten with its last holder (its children keep naming it).
#pragma once

#include <cstdint>
#include <vector>

#include "chunks.hpp"
#include "held.hpp"

namespace prfaas {

using i64 = std::int64_t;

constexpr u32 kNone = 0xFFFFFFFF;  // no node
constexpr u32 kRoot = 0xFFFFFFFE;  // as a parent: none, the block begins a prompt
constexpr u32 kFreed = 0xFFFFFFFD;  // greater than every index

struct __attribute__((packed, aligned(4))) Node {
  i64 hash;
  u32 parent;  // kNone for a block that nobody holds
  u32 child;   // the first of its held children
  u32 next;    // siblings; of a free node, the next free one
  u32 prev;
  u32 held;  // HeldSets number
};
static_assert(sizeof(Node) == 28);

// Where the next block may be: as far from the last one as that from the one before.
class Stride {
 public:
  u32 guess() const { return last_ + step_; }
  void found(u32 index) {
    step_ = index - last_;
    last_ = index;
  }

 private:
  u32 last_ = kNone, step_ = 0;
};

class Nodes {
 public:
  Nodes();

  Node& operator[](u32 index) { return nodes_[index]; }
  const Node& operator[](u32 index) const { return nodes_[index]; }

  // `guess`: where the block may be; blocks of a run mostly lie side by side.
  u32 find(i64 hash, u32 guess = kNone) const {
    if (guess < end_ && (*this)[guess].hash == hash && live(guess)) return guess;
    const u64 mixed = mix(hash);
    const std::uint8_t tag = tag_of(mixed);
    for (std::size_t at = mixed & mask_; tags_[at]; at = (at + 1) & mask_)
      if (tags_[at] == tag && (*this)[places_[at]].hash == hash) return places_[at];
    return kNone;
  }
  u32 find_or_make(i64 hash, u32 guess = kNone);
  void clear();
  // Frees a node that has no child, no parent and no holder.
  void free(u32 index);

  void link(u32 index, u32 parent);
  // Cuts a node from its parent and returns it, kRoot for none.
  u32 unlink(u32 index);

  // Nodes in use, and one past the highest index ever used.
  u32 count() const { return count_; }
  u32 end() const { return end_; }
  bool live(u32 index) const { return (*this)[index].prev != kFreed; }
  std::size_t bytes() const { return std::size_t{count_} * (sizeof(Node) + 10); }

 private:
  static u64 mix(i64 hash) {
    const u64 mixed = static_cast<u64>(hash) * 0x9E3779B97F4A7C15ull;
    return mixed ^ mixed >> 32;
  }
  // Seven bits beside those that choose the place: most probes of another block end without touching its node.
  static std::uint8_t tag_of(u64 mixed) { return static_cast<std::uint8_t>(mixed >> 57 | 0x80); }
  void rebuild();
  void put(u64 mixed, u32 index);

  static constexpr std::uint8_t kGone = 1;

  Chunks<Node, 0> nodes_;
  std::vector<std::uint8_t> tags_;  // 0 is an empty place, kGone one that was taken
  std::vector<u32> places_;
  std::size_t mask_;
  u32 count_ = 0;
  u32 gone_ = 0;  // places marked so
  u32 end_ = 0;
  u32 free_ = kNone;
};

// Here for speed: called for every block that comes or goes.

inline void Nodes::link(u32 index, u32 parent) {
  Node& node = (*this)[index];
  node.parent = parent;
  node.prev = node.next = kNone;
  if (parent == kRoot) return;
  Node& above = (*this)[parent];
  node.next = above.child;
  if (above.child != kNone) (*this)[above.child].prev = index;
  above.child = index;
}

inline u32 Nodes::unlink(u32 index) {
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

}  // namespace prfaas
