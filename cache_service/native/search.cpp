// What the index answers; core/index_search.py says how and why.
#include <algorithm>

#include "index.hpp"

namespace prfaas {

namespace {

// Deepest first, none twice.
void merge(std::vector<Depth>& depths) {
  std::sort(depths.begin(), depths.end(), [](const Depth& a, const Depth& b) { return a.matched > b.matched; });
  std::size_t kept = 0;
  for (std::size_t i = 1; i < depths.size(); ++i) {
    if (depths[i].matched == depths[kept].matched)
      depths[kept].holders |= depths[i].holders;
    else if (++kept != i)
      depths[kept] = std::move(depths[i]);
  }
  depths.erase(depths.begin() + static_cast<std::ptrdiff_t>(kept) + 1, depths.end());
}

}  // namespace

// The holders of a block of the query.
const u64* Index::row_at(const Query& query, std::size_t position, Near& near) const {
  i64 hash;
  if (!query.at(position, hash)) return sets_.block_row(kNobody);
  const u32 index = nodes_.find(hash, near.index + static_cast<u32>(position - near.position));
  if (index != kNone) near = Near{index, position};
  return sets_.block_row(index == kNone ? kNobody : nodes_[index].held);
}

Bits Index::holders_of(const Query& query, std::size_t position, Kind kind) const {
  Bits holders(sets_.words());
  i64 hash;
  if (!query.at(position, hash)) return holders;
  const u32 index = nodes_.find(hash);
  if (index != kNone) sets_.add_kind(nodes_[index].held, kind, holders);
  return holders;
}

Answer Index::match(const Query& query, std::size_t limit) {
  Answer answer;
  if (!query.size()) return answer;
  Near near;
  const Bits first = Bits(row_at(query, 0, near), sets_.words()) - quarantined_;
  if (!first.any()) return answer;
  const Bits walked = first & orphaned_;
  const Bits whole = first - walked;
  if (whole.any()) bisect(query, whole, answer.depths);
  if (walked.any()) {
    walk(query, walked, answer.depths);
    merge(answer.depths);
  }
  for (const Needs& needs : needs_)
    if ((needs.members & first).any()) usable(query, limit, needs, answer);
  if (budget_bytes_) {
    i64 hash;
    query.at(answer.depths[0].matched - 1, hash);
    uses_.touch(nodes_.find(hash));
  }
  return answer;
}

// Block by block, for holders that may have holes. O(depth).
void Index::walk(const Query& query, Bits alive, std::vector<Depth>& depths) const {
  Near near;
  for (std::size_t depth = 0; depth < query.size(); ++depth) {
    const Bits here(row_at(query, depth, near), sets_.words());
    const Bits gone = alive - here;
    if (!gone.any()) continue;
    depths.push_back(Depth{depth, gone});
    alive &= here;
    if (!alive.any()) return;
  }
  depths.push_back(Depth{query.size(), alive});
}

// For holders of the first block without holes, deepest first. O(k log n) for k different depths.
void Index::bisect(const Query& query, const Bits& alive, std::vector<Depth>& depths) const {
  // Rows of sets that others share: only the bits of `alive` in them count, and those only become fewer.
  struct Span {
    std::size_t low, high;
    const u64 *at_low, *at_high;
  };
  const u64* mask = alive.data();
  const u32 words = sets_.words();
  const auto same = [&](const u64* a, const u64* b) {
    u64 different = ((a[0] ^ b[0]) & mask[0]) | ((a[words - 1] ^ b[words - 1]) & mask[words - 1]);
    if (words <= 2) return !different;  // up to 128 holders: no loop
    for (u32 i = 0; i < words; ++i) different |= (a[i] ^ b[i]) & mask[i];
    return !different;
  };
  const auto found = [&](std::size_t depth, const u64* have, const u64* lack) {
    Bits holders = alive;
    holders.keep(have, words);
    if (lack) holders.take(lack, words);
    depths.push_back(Depth{depth, std::move(holders)});
  };
  const std::size_t last = query.size() - 1;
  Near near;
  const u64* at_last = row_at(query, last, near);
  if ((Bits(at_last, words) & alive).any()) found(last + 1, at_last, nullptr);
  if (same(at_last, mask)) return;
  depths.reserve(32);
  std::vector<Span> spans;
  spans.reserve(32);
  spans.push_back(Span{0, last, mask, at_last});
  while (!spans.empty()) {
    Span span = spans.back();
    spans.pop_back();
    while (span.high - span.low > 1) {
      const std::size_t middle = (span.low + span.high) / 2;
      const u64* at_middle = row_at(query, middle, near);
      if (same(at_middle, span.at_high)) {
        span.high = middle;
        continue;
      }
      if (!same(at_middle, span.at_low)) spans.push_back(Span{span.low, middle, span.at_low, at_middle});
      span.low = middle;
      span.at_low = at_middle;
    }
    found(span.high, span.at_low, span.at_high);
  }
}

// The deepest boundary at which each holder with these needs has what they say. One pass up from the deepest: a
// holder seeks a boundary with a state, then its window is checked; where that has a hole, it seeks on from there.
void Index::usable(const Query& query, std::size_t limit, const Needs& needs, Answer& answer) const {
  if (answer.usable.empty()) answer.usable.assign(holders_.size(), Answer::kWhole);
  std::vector<Depth> wanted;
  for (const Depth& depth : answer.depths) {
    Bits seekers = depth.holders & needs.members;
    seekers.each([&](u32 slot) {
      answer.usable[slot] = 0;
      if (!holders_[slot].group_entries) seekers.reset(slot);  // nothing to find
    });
    if (!seekers.any()) continue;
    const std::size_t at = std::min(depth.matched, limit);
    if (!wanted.empty() && wanted.back().matched == at)
      wanted.back().holders |= seekers;
    else
      wanted.push_back(Depth{at, seekers});
  }
  const auto found = [&](std::size_t boundary, const Bits& holders) {
    holders.each([&](u32 slot) { answer.usable[slot] = boundary; });
  };
  std::vector<Depth> checking, still;
  Bits seeking(sets_.words());
  std::size_t next = 0, boundary = 0;
  while (next < wanted.size() || !checking.empty() || seeking.any()) {
    if (checking.empty() && !seeking.any()) boundary = wanted[next].matched;
    if (boundary < 1) return;
    if (next < wanted.size() && wanted[next].matched == boundary) seeking |= wanted[next++].holders;
    const std::size_t position = boundary - 1;
    if (seeking.any()) {
      const Bits here = needs.state ? holders_of(query, position, kState) & seeking : seeking;
      if (here.any()) {
        seeking -= here;
        if (needs.window_blocks)
          checking.push_back(Depth{boundary, here});
        else
          found(boundary, here);
      }
    }
    --boundary;
    if (checking.empty()) continue;
    const Bits have = holders_of(query, position, kWindow);
    still.clear();
    for (const Depth& check : checking) {
      seeking |= check.holders - have;
      const Bits whole = check.holders & have;
      if (!whole.any()) continue;
      if (check.matched - boundary >= std::min<std::size_t>(needs.window_blocks, check.matched))
        found(check.matched, whole);
      else
        still.push_back(Depth{check.matched, whole});
    }
    checking.swap(still);
  }
}

}  // namespace prfaas
