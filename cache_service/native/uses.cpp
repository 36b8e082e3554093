#include "uses.hpp"

namespace prfaas {

void Uses::touch(u32 node) {
  place_of_.cover(node);
  u32 place = place_of_[node];
  if (place != kNone) {
    unlink(place);
  } else {
    place = free_;
    if (place != kNone)
      free_ = places_[place].next;
    else
      places_.cover(place = end_++);
    place_of_[node] = place;
    places_[place].node = node;
    ++count_;
  }
  append(place);
}

void Uses::clear() {
  place_of_.clear();
  places_.clear();
  end_ = count_ = 0;
  free_ = first_ = last_ = kNone;
}

void Uses::append(u32 place) {
  Place& at = places_[place];
  at.tick = ++clock_;
  at.prev = last_;
  at.next = kNone;
  (last_ == kNone ? first_ : places_[last_].next) = place;
  last_ = place;
}

void Uses::unlink(u32 place) {
  const Place& at = places_[place];
  (at.prev == kNone ? first_ : places_[at.prev].next) = at.next;
  (at.next == kNone ? last_ : places_[at.next].prev) = at.prev;
}

void Uses::remove(u32 place) {
  unlink(place);
  place_of_[places_[place].node] = kNone;
  places_[place].next = free_;
  free_ = place;
  --count_;
}

std::string Uses::check(u32 nodes) const {
  u32 found = 0, before = kNone;
  for (u32 place = first_; place != kNone; before = place, place = places_[place].next) {
    if (place >= end_ || ++found > count_) return "a place that is none";
    const Place& at = places_[place];
    if (at.prev != before) return "places are not linked both ways";
    if (before != kNone && at.tick <= places_[before].tick) return "places are not in the order of use";
    if (at.node >= nodes || place_of_[at.node] != place) return "a place that its block does not know";
  }
  if (last_ != before || found != count_) return "the last place is another";
  for (u32 place = free_; place != kNone; place = places_[place].next)
    if (place >= end_ || ++found > end_) return "a free place that is none";
  if (found != end_) return "a place that is lost";
  for (u32 node = 0; node < nodes && place_of_.covers(node); ++node) found -= place_of_[node] != kNone;
  return found == end_ - count_ ? "" : "a block whose place is another's";
}

}  // namespace prfaas
