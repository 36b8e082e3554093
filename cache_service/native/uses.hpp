// Which blocks were used longest ago; core/index_lru.py says what that means.
//
// A list in the order of use, of the blocks that have a place in it: every leaf, few others. A block that becomes
// a leaf takes the place of the child that went, so nothing is ever put but at the end, and nothing is searched.
#pragma once

#include <string>

#include "chunks.hpp"

namespace prfaas {

class Uses {
 public:
  static constexpr u32 kNone = 0xFFFFFFFF;

  // Puts a block at the end: it was used now.
  void touch(u32 node);
  // Takes a block's place away.
  void drop(u32 node) {
    if (has(node)) remove(place_of_[node]);
  }
  // Gives the place that a block has to another, which keeps its own when that is later.
  void pass(u32 from, u32 to);
  // The block used longest ago, kNone when none has a place.
  u32 oldest() const { return first_ == kNone ? kNone : places_[first_].node; }
  bool has(u32 node) const { return place_of_.covers(node) && place_of_[node] != kNone; }
  void clear();

  // For so many nodes.
  std::size_t bytes(u32 nodes) const {
    return std::size_t{nodes} * sizeof(u32) + std::size_t{count_} * sizeof(Place);
  }
  // Empty when the list is whole, else what is wrong. O(places).
  std::string check(u32 nodes) const;

 private:
  struct __attribute__((packed, aligned(4))) Place {
    std::uint64_t tick;
    u32 node;
    u32 prev;
    u32 next;  // of a free one, the next free one
  };
  static_assert(sizeof(Place) == 20);

  void append(u32 place);
  void unlink(u32 place);
  void remove(u32 place);

  Chunks<u32, 0xFF> place_of_;  // by node
  Chunks<Place, 0> places_;
  u32 end_ = 0, free_ = kNone, count_ = 0;
  u32 first_ = kNone, last_ = kNone;
  std::uint64_t clock_ = 0;
};

// Here for speed: called for every block that goes.
inline void Uses::pass(u32 from, u32 to) {
  const u32 place = place_of_[from];
  place_of_.cover(to);
  const u32 own = place_of_[to];
  if (own != kNone && places_[own].tick > places_[place].tick) return remove(place);
  if (own != kNone) remove(own);
  place_of_[from] = kNone;
  place_of_[to] = place;
  places_[place].node = to;
}

}  // namespace prfaas
