#include "page_table.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace selfforcing {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

}  // namespace

PageTable::PageTable(int64_t num_streams, int64_t page_size, int64_t sink_tokens)
    : page_size_(page_size), sink_tokens_(sink_tokens), sink_pages_(0) {
  require(num_streams >= 1, "num_streams is " + std::to_string(num_streams) + ", but must be at least 1");
  require(page_size >= 1, "page_size is " + std::to_string(page_size) + ", but must be at least 1");
  require(sink_tokens >= 0, "sink_tokens is " + std::to_string(sink_tokens) + ", but must be at least 0");
  sink_pages_ = ceil_div(sink_tokens, page_size);
  streams_.resize(num_streams);
}

const PageTable::Stream& PageTable::at(int64_t stream) const {
  require(stream >= 0 && stream < num_streams(),
          "stream is " + std::to_string(stream) + ", but must be in [0, " + std::to_string(num_streams()) + ")");
  return streams_[stream];
}

void PageTable::add_pages(int64_t count) {
  require(count >= 0, "count is " + std::to_string(count) + ", but must be at least 0");
  const int64_t first = num_pages();
  references_.resize(first + count, 0);
  // Lowest number on top, so that a fresh pool is filled from its start.
  std::vector<int32_t> fresh(count);
  for (int64_t i = 0; i < count; ++i) fresh[i] = static_cast<int32_t>(first + count - 1 - i);
  free_pages_.insert(free_pages_.begin(), fresh.begin(), fresh.end());
}

int64_t PageTable::pages_needed(int64_t stream, int64_t num_tokens) const {
  const Stream& s = at(stream);
  const int64_t held = static_cast<int64_t>(s.row.size()) + s.num_released;
  return std::max<int64_t>(0, ceil_div(s.num_tokens + num_tokens, page_size_) - held);
}

void PageTable::append(int64_t stream, int64_t num_tokens) {
  const int64_t needed = pages_needed(stream, num_tokens);
  if (needed > num_free_pages())
    throw std::length_error("num_tokens is " + std::to_string(num_tokens) + ", which takes " + std::to_string(needed) +
                            " pages, but " + std::to_string(num_free_pages()) + " are free");
  Stream& s = streams_[stream];
  for (int64_t i = 0; i < needed; ++i) {
    const int32_t page = free_pages_.back();
    free_pages_.pop_back();
    references_[page] = 1;
    s.row.push_back(page);
  }
  s.num_tokens += num_tokens;
}

int64_t PageTable::pages_before(const Stream& s, int64_t first_visible) const {
  const int64_t first_page = std::min(first_visible, s.num_tokens) / page_size_;  // the first that is still needed
  const int64_t moving_pages = std::max<int64_t>(0, static_cast<int64_t>(s.row.size()) - sink_pages_);
  return std::clamp<int64_t>(first_page - sink_pages_ - s.num_released, 0, moving_pages);
}

int64_t PageTable::releasable(int64_t stream, int64_t first_visible) const {
  const Stream& s = at(stream);
  const auto begin = s.row.begin() + std::min<int64_t>(sink_pages_, s.row.size());
  return std::count_if(begin, begin + pages_before(s, first_visible),
                       [this](int32_t page) { return references_[page] == 1; });
}

void PageTable::release_before(int64_t stream, int64_t first_visible) {
  const int64_t count = pages_before(at(stream), first_visible);
  if (count == 0) return;
  Stream& s = streams_[stream];
  const auto begin = s.row.begin() + sink_pages_;
  std::for_each(begin, begin + count, [this](int32_t page) { release(page); });
  s.row.erase(begin, begin + count);
  s.num_released += count;
}

void PageTable::clear() {
  for (Stream& s : streams_) {
    // Last page first, so that the next tokens get the same pages in the same order.
    std::for_each(s.row.rbegin(), s.row.rend(), [this](int32_t page) { release(page); });
    s = Stream();
  }
}

int64_t PageTable::position(int64_t stream, int64_t token) const {
  const Stream& s = at(stream);
  return token / page_size_ < sink_pages_ ? token : token - s.num_released * page_size_;
}

std::vector<PageTable::Spans> PageTable::spans(int64_t stream, const std::vector<int64_t>& first_visible,
                                               int64_t num_tokens) const {
  const int64_t released = at(stream).num_released;
  const int64_t first_held = released > 0 ? (sink_pages_ + released) * page_size_ : 0;
  const int64_t sink_end = std::min(sink_tokens_, num_tokens);
  std::vector<Spans> result;
  result.reserve(first_visible.size());
  for (const int64_t first : first_visible) {
    const int64_t window_start = std::min(std::max({first, first_held, sink_end}), num_tokens);
    const int64_t start = position(stream, window_start);
    result.push_back({{{0, sink_end}, {start, start + (num_tokens - window_start)}}});
  }
  return result;
}

void PageTable::pin(const std::vector<int32_t>& pages) {
  for (const int32_t page : pages) ++references_.at(page);
}

void PageTable::unpin(const std::vector<int32_t>& pages) {
  for (const int32_t page : pages) release(page);
}

void PageTable::release(int32_t page) {
  if (--references_.at(page) == 0) free_pages_.push_back(page);
}

}  // namespace selfforcing
