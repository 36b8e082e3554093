// What the decoders of event batches share: reading msgpack, and finding a hash that is there twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace prfaas {

using std::size_t;
using std::string_view;

constexpr size_t kMaxBlocksPerEvent = 1u << 20;

// Reads msgpack; the first thing that is not as expected makes everything after it fail.
class Reader {
 public:
  Reader(const unsigned char* data, size_t size) : at_(data), end_(data + size) {}

  bool done() const { return at_ == end_; }
  bool nil() {
    if (at_ == end_ || *at_ != 0xC0) return false;
    ++at_;
    return true;
  }
  bool integer(std::int64_t& value) {
    if (at_ == end_) return false;
    const unsigned char kind = *at_++;
    if (kind < 0x80 || kind >= 0xE0) return value = static_cast<std::int8_t>(kind), true;
    std::uint64_t raw;
    // Hashes: one kind or the other, in no order that could be predicted.
    if (const bool whole = kind == 0xCF; whole | (kind == 0xD3))
      return big(8, raw) && (value = static_cast<std::int64_t>(raw), !(whole & (value < 0)));
    switch (kind) {
      case 0xCC: return big(1, raw) && (value = static_cast<std::int64_t>(raw), true);
      case 0xCD: return big(2, raw) && (value = static_cast<std::int64_t>(raw), true);
      case 0xCE: return big(4, raw) && (value = static_cast<std::int64_t>(raw), true);
      case 0xD0: return big(1, raw) && (value = static_cast<std::int8_t>(raw), true);
      case 0xD1: return big(2, raw) && (value = static_cast<std::int16_t>(raw), true);
      case 0xD2: return big(4, raw) && (value = static_cast<std::int32_t>(raw), true);
      default: return false;
    }
  }
  bool real(double& value) {
    std::uint64_t raw;
    if (at_ == end_ || *at_++ != 0xCB || !big(8, raw)) return false;
    std::memcpy(&value, &raw, sizeof value);
    return true;
  }
  bool text(string_view& value) {
    if (at_ == end_) return false;
    const unsigned char kind = *at_++;
    std::uint64_t length;
    if (kind >= 0xA0 && kind < 0xC0)
      length = kind & 0x1F;
    else if (!(kind == 0xD9 && big(1, length)) && !(kind == 0xDA && big(2, length)))
      return false;
    if (length > left()) return false;
    value = string_view(reinterpret_cast<const char*>(at_), length);
    at_ += length;
    return true;
  }
  bool boolean(bool& value) {
    if (at_ == end_ || (*at_ != 0xC2 && *at_ != 0xC3)) return false;
    value = *at_++ == 0xC3;
    return true;
  }
  // Bytes, read in place.
  bool bytes(string_view& value) {
    if (at_ == end_) return false;
    const unsigned char kind = *at_++;
    std::uint64_t length;
    if (kind < 0xC4 || kind > 0xC6 || !big(size_t{1} << (kind - 0xC4), length) || length > left()) return false;
    value = string_view(reinterpret_cast<const char*>(at_), length);
    at_ += length;
    return true;
  }
  bool array(size_t& length) { return container(0x90, 0xDC, length); }
  bool map(size_t& length) { return container(0x80, 0xDE, length); }

  bool skip(int depth = 0) {
    if (at_ == end_ || depth > 16) return false;
    const unsigned char kind = *at_;
    size_t length;
    if ((kind & 0xF0) == 0x90 || kind == 0xDC || kind == 0xDD) {
      if (!array(length)) return false;
      while (length) {
        if (const size_t numbers = skip_numbers(length)) {
          length -= numbers;
          continue;
        }
        if (!skip(depth + 1)) return false;
        --length;
      }
      return true;
    }
    if ((kind & 0xF0) == 0x80 || kind == 0xDE || kind == 0xDF) {
      if (!map(length)) return false;
      for (length *= 2; length--;)
        if (!skip(depth + 1)) return false;
      return true;
    }
    ++at_;
    if (kind < 0x80 || kind >= 0xE0 || kind == 0xC0 || kind == 0xC2 || kind == 0xC3) return true;
    if (kind >= 0xA0 && kind < 0xC0) return over(kind & 0x1F);
    switch (kind) {
      case 0xCC: case 0xD0: return over(1);
      case 0xCD: case 0xD1: return over(2);
      case 0xCE: case 0xD2: case 0xCA: return over(4);
      case 0xCF: case 0xD3: case 0xCB: return over(8);
      case 0xC4: case 0xD9: return big(1, length_) && over(length_);
      case 0xC5: case 0xDA: return big(2, length_) && over(length_);
      case 0xC6: case 0xDB: return big(4, length_) && over(length_);
      default: return false;
    }
  }

 private:
  // Skips up to `most` unsigned numbers: token ids, the bulk of a batch. Returns how many.
  size_t skip_numbers(size_t most) {
    const unsigned char* at = at_;
    size_t rest = most;
    for (unsigned kind = left() ? *at : 0; rest && static_cast<size_t>(end_ - at) > 9; --rest) {
      const unsigned wide = kind - 0xCD;
      if (wide <= 1) {
        // Two or four bytes, most ids, in no order that could be predicted: both successors are read, one is kept.
        const unsigned mask = 0u - wide;
        kind = (at[3] & ~mask) | (at[5] & mask);
        at += 3 + 2 * wide;
      } else {
        const size_t number = bytes_of_number(kind);
        if (!number) break;
        at += number;
        kind = *at;
      }
    }
    at_ = at;
    return most - rest;
  }
  // 0 for what is no unsigned number.
  static size_t bytes_of_number(unsigned char kind) {
    if (kind < 0x80) return 1;
    return kind >= 0xCC && kind <= 0xCF ? (size_t{1} << (kind - 0xCC)) + 1 : 0;
  }
  size_t left() const { return static_cast<size_t>(end_ - at_); }
  bool over(std::uint64_t bytes) {
    if (bytes > left()) return false;
    at_ += bytes;
    return true;
  }
  bool big(size_t bytes, std::uint64_t& value) {
    if (left() < bytes) return false;
    value = 0;
    if (bytes == 8) {  // hashes; compilers make one load of it
      for (size_t i = 0; i < 8; ++i) value |= std::uint64_t{at_[i]} << (56 - 8 * i);
    } else {
      for (size_t i = 0; i < bytes; ++i) value = value << 8 | at_[i];
    }
    at_ += bytes;
    return true;
  }
  bool container(unsigned char small, unsigned char large, size_t& length) {
    if (at_ == end_) return false;
    const unsigned char kind = *at_++;
    std::uint64_t value;
    if ((kind & 0xF0) == small)
      value = kind & 0x0F;
    else if (!(kind == large && big(2, value)) && !(kind == large + 1 && big(4, value)))
      return false;
    length = value;
    return length <= left();  // each element takes a byte at least
  }

  const unsigned char* at_;
  const unsigned char* end_;
  std::uint64_t length_ = 0;
};

// Whether any of `count` hashes is there twice.
class Duplicates {
 public:
  bool among(const std::int64_t* hashes, size_t count) {
    if (count <= 8) {
      for (size_t i = 1; i < count; ++i)
        for (size_t j = 0; j < i; ++j)
          if (hashes[i] == hashes[j]) return true;
      return false;
    }
    size_t capacity = 16;
    while (capacity < 4 * count) capacity *= 2;  // so that few collide
    places_.assign(capacity, 0);
    for (size_t i = 0; i < count; ++i) {
      std::uint64_t mixed = static_cast<std::uint64_t>(hashes[i]) * 0x9E3779B97F4A7C15ull;
      size_t at = (mixed ^ mixed >> 32) & (capacity - 1);
      for (; places_[at]; at = (at + 1) & (capacity - 1))
        if (hashes[places_[at] - 1] == hashes[i]) return true;
      places_[at] = static_cast<std::uint32_t>(i + 1);
    }
    return false;
  }

 private:
  std::vector<std::uint32_t> places_;
};

}  // namespace prfaas
