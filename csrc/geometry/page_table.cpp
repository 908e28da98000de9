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

const PageTable::Run* PageTable::find(const Row& row, int64_t logical) {
  const auto after = std::upper_bound(row.runs.begin(), row.runs.end(), logical,
                                      [](int64_t wanted, const Run& run) { return wanted < run.logical; });
  if (after == row.runs.begin() || logical >= std::prev(after)->logical_end()) return nullptr;
  return &*std::prev(after);
}

void PageTable::insert(Row& row, int64_t logical, int32_t page) {
  auto run =
      std::find_if(row.runs.rbegin(), row.runs.rend(), [&](const Run& run) { return run.logical < logical; }).base();
  const bool goes_on = run != row.runs.begin() && std::prev(run)->logical_end() == logical;
  const int64_t index = run == row.runs.begin() ? 0 : std::prev(run)->index + std::prev(run)->count;
  run = goes_on ? std::prev(run) : row.runs.insert(run, {logical, index, 0});
  ++run->count;
  row.pages.insert(row.pages.begin() + index, page);
  const auto next = std::next(run);
  for (auto later = next; later != row.runs.end(); ++later) ++later->index;
  if (next != row.runs.end() && next->logical == run->logical_end()) {
    run->count += next->count;
    row.runs.erase(next);
  }
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
  for (const int32_t page : row.pages) ++pages_[page].streams;
  streams_[next_stream_] = row;
  return next_stream_++;
}

void PageTable::close(int64_t stream) {
  retain(stream, {});
  streams_.erase(stream);
}

PageTable::Advanced PageTable::advance(const std::vector<Step>& steps) {
  // What is changed, to take it back.
  std::vector<Row> rows;
  Changes changes;
  for (const Step& step : steps) {
    require_range(step.written);
    rows.push_back(at(step.stream));
  }
  Advanced result;
  for (const Step& step : steps) keep(streams_.at(step.stream), step.kept, changes);
  for (const Step& step : steps) prepare_write(step, result, changes);
  if (result.shortage > 0) {
    undo(changes);
    for (size_t i = steps.size(); i-- > 0;) streams_[steps[i].stream] = std::move(rows[i]);
    result.copies.clear();
  }
  return result;
}

void PageTable::prepare_write(const Step& step, Advanced& result, Changes& changes) {
  const Range tokens = step.written;
  if (tokens.first == tokens.second) return;
  Row& row = streams_.at(step.stream);
  const auto taken = [&] {
    const int32_t page = take(changes);
    result.shortage += page < 0;
    return page;
  };
  for (int64_t logical = tokens.first / page_size_; logical <= (tokens.second - 1) / page_size_; ++logical) {
    const Run* run = find(row, logical);
    if (run == nullptr) {
      insert(row, logical, taken());
      continue;
    }
    int32_t& page = row.pages[run->index + logical - run->logical];
    const int64_t start = logical * page_size_;
    if (page < 0 || !must_copy(pages_[page], std::max<int64_t>(0, tokens.first - start))) continue;
    const int32_t old = page;
    page = taken();
    const bool whole = tokens.first <= start && start + page_size_ <= tokens.second;
    if (step.again || !whole) result.copies.emplace_back(old, page);
    give_back(old, changes);
  }
}

int32_t PageTable::take(Changes& changes) {
  if (free_pages_.empty()) return -1;
  const int32_t page = free_pages_.back();
  free_pages_.pop_back();
  pages_[page].streams = 1;
  changes.push_back({page, true});
  return page;
}

void PageTable::give_back(int32_t page, Changes& changes) {
  --pages_[page].streams;
  free_if_unused(page);
  changes.push_back({page, false});
}

void PageTable::undo(const Changes& changes) {
  for (auto change = changes.rbegin(); change != changes.rend(); ++change) {
    Page& page = pages_[change->page];
    if (change->taken) {
      page.streams = 0;
      free_pages_.push_back(change->page);
    } else {
      if (page.streams == 0 && page.pins == 0) free_pages_.pop_back();
      ++page.streams;
    }
  }
}

PageTable::Ranges PageTable::pages_of(const Ranges& tokens) const {
  Ranges pages;
  for (const auto& [start, end] : tokens) {
    if (start >= end) continue;
    const int64_t first = start / page_size_, last = (end - 1) / page_size_;
    if (!pages.empty() && first <= pages.back().second)
      pages.back().second = last + 1;
    else
      pages.emplace_back(first, last + 1);
  }
  return pages;
}

void PageTable::retain(int64_t stream, const Ranges& tokens) {
  at(stream);
  Changes changes;
  keep(streams_.at(stream), tokens, changes);
}

void PageTable::keep(Row& row, const Ranges& tokens, Changes& changes) {
  std::vector<Run> kept;  // with the places of now
  const Ranges pages = pages_of(tokens);
  for (const Run& run : row.runs)
    for (const auto& [first, end] : pages) {
      const int64_t start = std::max(first, run.logical), count = std::min(end, run.logical_end()) - start;
      if (count > 0) kept.push_back({start, run.index + start - run.logical, count});
    }
  // Last page first, so that the next tokens get the same pages in the same order.
  int64_t leave_end = static_cast<int64_t>(row.pages.size());
  const auto give_back_from = [&](int64_t first) {
    while (leave_end > first) give_back(row.pages[--leave_end], changes);
  };
  for (auto run = kept.rbegin(); run != kept.rend(); ++run) {
    give_back_from(run->index + run->count);
    leave_end = run->index;
  }
  give_back_from(0);
  auto end = row.pages.begin();
  for (Run& run : kept) {
    const auto first = row.pages.begin() + run.index;
    run.index = end - row.pages.begin();
    end = first == end ? end + run.count : std::copy(first, first + run.count, end);
  }
  row.pages.erase(end, row.pages.end());
  row.runs = std::move(kept);
}

void PageTable::copy_rows(const std::vector<int64_t>& streams, int32_t* table, int64_t stride) const {
  for (const int64_t stream : streams) {
    const std::vector<int32_t>& pages = row(stream);
    require(static_cast<int64_t>(pages.size()) <= stride, "the table has " + std::to_string(stride) +
                                                              " entries a row, but stream " + std::to_string(stream) +
                                                              " has " + std::to_string(pages.size()) + " pages");
    std::copy(pages.begin(), pages.end(), table);
    table += stride;
  }
}

PageTable::Range PageTable::position(int64_t stream, Range tokens) const {
  require_range(tokens);
  const Row& row = at(stream);
  if (tokens.first == tokens.second) return {0, 0};
  const Run* run = find(row, (tokens.second - 1) / page_size_);
  if (run == nullptr) return {0, 0};
  const int64_t offset = (run->index - run->logical) * page_size_;
  return {offset + std::max(tokens.first, run->logical * page_size_), offset + tokens.second};
}

int64_t PageTable::pin(const std::vector<int64_t>& streams, const std::vector<int64_t>& num_tokens) {
  require(streams.size() == num_tokens.size(), "num_tokens has " + std::to_string(num_tokens.size()) +
                                                   " entries, but must have " + std::to_string(streams.size()) +
                                                   " like streams");
  std::vector<int32_t> pinned;
  for (size_t i = 0; i < streams.size(); ++i)
    for (const Run& run : at(streams[i]).runs)
      for (int64_t j = 0; j < run.count; ++j) {
        const int64_t slots = std::min(page_size_, num_tokens[i] - (run.logical + j) * page_size_);
        if (slots <= 0) break;
        const int32_t number = row(streams[i])[run.index + j];
        Page& page = pages_[number];
        ++page.pins;
        page.pinned_slots = std::max(page.pinned_slots, static_cast<int32_t>(slots));
        pinned.push_back(number);
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
