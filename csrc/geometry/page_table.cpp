#include "page_table.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>

namespace selfforcing {

namespace {

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

std::string text(PageTable::Range tokens) {
  std::ostringstream text;
  text << '[' << tokens.first << ", " << tokens.second << ')';
  return text.str();
}

void require_range(PageTable::Range tokens) {
  require(0 <= tokens.first && tokens.first <= tokens.second,
          "tokens are " + text(tokens) + ", but must be a range from 0 on");
}

}  // namespace

PageTable::PageTable(int64_t page_size) : page_size_(page_size) {
  require(page_size >= 1, "page_size is " + std::to_string(page_size) + ", but must be at least 1");
}

PageTable::Stats PageTable::stats() const {
  Stats stats;
  for (const Page& page : pages_) {
    stats.used += page.streams > 0;
    stats.shared += page.streams > 1;
    stats.pinned += page.streams == 0 && page.pins > 0;
  }
  return stats;
}

const PageTable::Row& PageTable::at(int64_t stream) const {
  const auto found = streams_.find(stream);
  require(found != streams_.end(), "stream is " + std::to_string(stream) + ", but must be an open one");
  return found->second;
}

PageTable::Row::const_iterator PageTable::find(const Row& row, int64_t logical) {
  return std::lower_bound(row.begin(), row.end(), logical,
                          [](const Entry& entry, int64_t wanted) { return entry.logical < wanted; });
}

void PageTable::add_pages(int64_t count) {
  require(count >= 0, "count is " + std::to_string(count) + ", but must be at least 0");
  const int64_t first = num_pages();
  pages_.resize(first + count);
  // Lowest number on top, so that a fresh pool is filled from its start.
  std::vector<int32_t> fresh(count);
  for (int64_t i = 0; i < count; ++i) fresh[i] = static_cast<int32_t>(first + count - 1 - i);
  free_pages_.insert(free_pages_.begin(), fresh.begin(), fresh.end());
}

int64_t PageTable::open() {
  streams_[next_stream_];
  return next_stream_++;
}

int64_t PageTable::fork(int64_t stream) {
  const Row row = at(stream);
  for (const Entry& entry : row) ++pages_[entry.page].streams;
  streams_[next_stream_] = row;
  return next_stream_++;
}

void PageTable::close(int64_t stream) {
  retain(stream, {});
  streams_.erase(stream);
}

PageTable::Advanced PageTable::advance(const std::vector<Step>& steps) {
  int64_t most = 0;  // pages that can be needed
  for (const Step& step : steps) {
    at(step.stream);
    require_range(step.written);
    most += (step.written.second - step.written.first + page_size_ - 1) / page_size_ + 1;
  }
  // What is changed, to take it back.
  const bool may_fail = most > num_free_pages();
  std::vector<Page> pages;
  std::vector<int32_t> free_pages;
  std::vector<Row> rows;
  if (may_fail) {
    pages = pages_, free_pages = free_pages_;
    for (const Step& step : steps) rows.push_back(at(step.stream));
  }
  Advanced result;
  for (const Step& step : steps) retain(step.stream, step.kept);
  for (const Step& step : steps) prepare_write(step, result);
  if (result.shortage > 0) {
    pages_ = std::move(pages), free_pages_ = std::move(free_pages);
    for (size_t i = steps.size(); i-- > 0;) streams_[steps[i].stream] = std::move(rows[i]);
    result.copies.clear();
  }
  return result;
}

void PageTable::prepare_write(const Step& step, Advanced& result) {
  const Range tokens = step.written;
  if (tokens.first == tokens.second) return;
  const auto take = [&] {
    if (free_pages_.empty()) {
      ++result.shortage;
      return -1;
    }
    const int32_t page = free_pages_.back();
    free_pages_.pop_back();
    pages_[page].streams = 1;
    return page;
  };
  Row& row = streams_.at(step.stream);
  const int64_t first = tokens.first / page_size_, last = (tokens.second - 1) / page_size_;
  auto entry = row.begin() + (find(row, first) - row.cbegin());
  for (int64_t logical = first; logical <= last; ++logical, ++entry) {
    const int64_t start = logical * page_size_;
    if (entry == row.end() || entry->logical != logical) {
      entry = row.insert(entry, {logical, take()});
    } else if (must_copy(pages_[entry->page], std::max<int64_t>(0, tokens.first - start))) {
      const int32_t old = entry->page;
      entry->page = take();
      const bool whole = tokens.first <= start && start + page_size_ <= tokens.second;
      if (step.again || !whole) result.copies.emplace_back(old, entry->page);
      --pages_[old].streams;
      free_if_unused(old);
    }
  }
}

bool PageTable::holds_any(const Entry& entry, const Ranges& tokens) const {
  const int64_t start = entry.logical * page_size_, end = start + page_size_;
  return std::any_of(tokens.begin(), tokens.end(),
                     [&](Range range) { return std::max(range.first, start) < std::min(range.second, end); });
}

void PageTable::retain(int64_t stream, const Ranges& tokens) {
  at(stream);
  Row& row = streams_.at(stream);
  // Last page first, so that the next tokens get the same pages in the same order.
  for (auto entry = row.rbegin(); entry != row.rend(); ++entry)
    if (!holds_any(*entry, tokens)) {
      --pages_[entry->page].streams;
      free_if_unused(entry->page);
    }
  row.erase(std::remove_if(row.begin(), row.end(), [&](const Entry& entry) { return !holds_any(entry, tokens); }),
            row.end());
}

std::vector<int32_t> PageTable::row(int64_t stream) const {
  std::vector<int32_t> pages;
  for (const Entry& entry : at(stream)) pages.push_back(entry.page);
  return pages;
}

void PageTable::copy_rows(const std::vector<int64_t>& streams, int32_t* table, int64_t stride) const {
  for (const int64_t stream : streams) {
    const Row& row = at(stream);
    require(static_cast<int64_t>(row.size()) <= stride, "the table has " + std::to_string(stride) +
                                                            " entries a row, but stream " + std::to_string(stream) +
                                                            " has " + std::to_string(row.size()) + " pages");
    std::transform(row.begin(), row.end(), table, [](const Entry& entry) { return entry.page; });
    table += stride;
  }
}

PageTable::Range PageTable::position(int64_t stream, Range tokens) const {
  require_range(tokens);
  const Row& row = at(stream);
  if (tokens.first == tokens.second) return {0, 0};
  const int64_t last = (tokens.second - 1) / page_size_, first = tokens.first / page_size_;
  const auto found = find(row, last);
  if (found == row.end() || found->logical != last) return {0, 0};
  auto start = found;
  while (start != row.begin() && start->logical > first && std::prev(start)->logical == start->logical - 1) --start;
  const auto place = [&](Row::const_iterator entry, int64_t token) {
    return (entry - row.begin()) * page_size_ + token - entry->logical * page_size_;
  };
  return {place(start, std::max(tokens.first, start->logical * page_size_)), place(found, tokens.second)};
}

int64_t PageTable::pin(const std::vector<int64_t>& streams, const std::vector<int64_t>& num_tokens) {
  require(streams.size() == num_tokens.size(), "num_tokens has " + std::to_string(num_tokens.size()) +
                                                   " entries, but must have " + std::to_string(streams.size()) +
                                                   " like streams");
  std::vector<int32_t> pinned;
  for (size_t i = 0; i < streams.size(); ++i)
    for (const Entry& entry : at(streams[i])) {
      const int64_t slots = std::min(page_size_, num_tokens[i] - entry.logical * page_size_);
      if (slots <= 0) continue;
      Page& page = pages_[entry.page];
      ++page.pins;
      page.pinned_slots = std::max(page.pinned_slots, static_cast<int32_t>(slots));
      pinned.push_back(entry.page);
    }
  readers_[next_reader_] = std::move(pinned);
  return next_reader_++;
}

void PageTable::unpin(int64_t reader) {
  const auto found = readers_.find(reader);
  require(found != readers_.end(), "reader is " + std::to_string(reader) + ", but must be one that pinned pages");
  for (const int32_t page : found->second) {
    if (--pages_[page].pins == 0) pages_[page].pinned_slots = 0;
    free_if_unused(page);
  }
  readers_.erase(found);
}

void PageTable::free_if_unused(int32_t page) {
  if (pages_[page].streams == 0 && pages_[page].pins == 0) free_pages_.push_back(page);
}

}  // namespace selfforcing
