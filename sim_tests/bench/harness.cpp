// Runs one generated accelerator under Verilator: a memory behind its AXI4 port, its registers over AXI4-Lite, a
// program from start to interrupt, and a JSON report. One process is one run.
//
// Built by sim_tests/bench/build.py with SUMMAND_HEADER naming the generated C header (registers, bus width).
// Inputs are driven before the rising edge from state alone, outputs are sampled just before that edge, so nothing here
// depends combinationally on the design.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "Vdut.h"
#include "verilated.h"
#if VM_TRACE_FST
#include "verilated_fst_c.h"
#endif
#include SUMMAND_HEADER

// Verilator spells a double underscore in a port name ___05F.
#define LITE(name) dut_->s_axil___05F##name
#define AXI(name) dut_->m_axi___05F##name

namespace {

constexpr unsigned kBeatBytes = SUMMAND_DATA_BITS / 8;
constexpr unsigned kPageBytes = 4096;
constexpr unsigned kExecuteStates = 8;
constexpr uint8_t kOkay = 0, kSlaveError = 2, kDecodeError = 3;
// Bursts the memory takes ahead, and W beats it takes before their AW.
constexpr size_t kBurstsAhead = 64, kBeatsAhead = 256;

struct Options {
  std::string memory, dump, waves;
  uint64_t base = 0x10000000, bytes = 0, program = 0, seed = 1, limit = 1000000000ull;
  uint64_t watchdog = 0;
  bool set_watchdog = false, profile = false;
  unsigned count = 0, latency = 16, write_latency = 16;
  double stall = 0;
  // Bursts that touch this memory offset answer SLVERR; all ones: none.
  uint64_t error_offset = ~0ull;
};

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error(text); }

// xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators", 2016.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull | 1) {}
  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545F4914F6CDD1Dull;
  }
  bool chance(double p) { return p > 0 && static_cast<double>(next() >> 11) * 0x1.0p-53 < p; }

 private:
  uint64_t state_;
};

// A port of any width as bytes, little-endian (Verilator's own order on the hosts it supports).
template <typename Port>
void put(Port& port, const uint8_t* bytes, size_t count) { std::memcpy(&port, bytes, count); }
template <typename Port>
void get(const Port& port, uint8_t* bytes, size_t count) { std::memcpy(bytes, &port, count); }

struct Burst {
  uint64_t address;
  unsigned beats, id;
  uint64_t ready;  // first cycle in which it may answer
};

struct Beat {
  std::array<uint8_t, kBeatBytes> data;
  std::array<uint8_t, (kBeatBytes + 7) / 8> strobe;
  bool last;
};

// An offer must stay, unchanged, until it is taken: one watcher for each channel that the design drives.
class Watcher {
 public:
  explicit Watcher(const char* name) : name_(name) {}
  // Returns an empty text, or what is wrong.
  std::string observe(bool valid, bool ready, const std::string& payload) {
    std::string wrong;
    if (offered_ && !valid) wrong = std::string(name_) + " was withdrawn before it was taken";
    else if (offered_ && payload != payload_) wrong = std::string(name_) + " changed before it was taken";
    offered_ = valid && !ready;
    if (offered_) payload_ = payload;
    return wrong;
  }

 private:
  const char* name_;
  bool offered_ = false;
  std::string payload_;
};

struct Mark {
  unsigned mark;
  uint64_t cycle, read_beats, write_beats;
  std::array<uint64_t, kExecuteStates> execute;
};

class Bench {
 public:
  explicit Bench(const Options& options)
      : options_(options), random_(options.seed), context_(new VerilatedContext) {
    context_->randReset(0);
#if VM_TRACE_FST
    context_->traceEverOn(true);
#endif
    dut_ = std::make_unique<Vdut>(context_.get());
#if VM_TRACE_FST
    if (!options.waves.empty()) {
      trace_ = std::make_unique<VerilatedFstC>();
      dut_->trace(trace_.get(), 99);
      trace_->open(options.waves.c_str());
    }
#endif
  }

  ~Bench() {
#if VM_TRACE_FST
    if (trace_) trace_->close();
#endif
    dut_->final();
  }

  void load() {
    std::FILE* file = std::fopen(options_.memory.c_str(), "rb");
    if (!file) fail("cannot read " + options_.memory);
    std::fseek(file, 0, SEEK_END);
    memory_.resize(static_cast<size_t>(std::ftell(file)));
    std::rewind(file);
    const size_t got = std::fread(memory_.data(), 1, memory_.size(), file);
    std::fclose(file);
    if (got != memory_.size()) fail("cannot read all of " + options_.memory);
    if (memory_.size() % kBeatBytes) fail("memory image must be whole beats");
  }

  void dump() const {
    if (options_.dump.empty()) return;
    std::FILE* file = std::fopen(options_.dump.c_str(), "wb");
    if (!file) fail("cannot write " + options_.dump);
    const size_t put = std::fwrite(memory_.data(), 1, memory_.size(), file);
    if (std::fclose(file) || put != memory_.size()) fail("cannot write all of " + options_.dump);
  }

  void reset() {
    dut_->rst = 1;
    for (int n = 0; n < 4; n++) tick();
    dut_->rst = 0;
    tick();
  }

  uint32_t read(uint32_t address) {
    LITE(araddr) = address, LITE(arprot) = 0, LITE(arvalid) = 1, LITE(rready) = 1;
    for (int n = 0; n < kLiteCycles; n++) {
      tick();
      if (lite_.ar) LITE(arvalid) = 0;
      if (lite_.r) {
        LITE(rready) = 0;
        if (lite_.rresp != kOkay) fail("register read answered with an error");
        return lite_.rdata;
      }
    }
    fail("register read was not answered");
  }

  void write(uint32_t address, uint32_t data, bool starts = false) {
    LITE(awaddr) = address, LITE(awprot) = 0, LITE(awvalid) = 1;
    LITE(wdata) = data, LITE(wstrb) = 0xF, LITE(wvalid) = 1, LITE(bready) = 1;
    bool aw = false, w = false;
    for (int n = 0; n < kLiteCycles; n++) {
      tick();
      const bool taken = aw && w;
      if (lite_.aw) LITE(awvalid) = 0, aw = true;
      if (lite_.w) LITE(wvalid) = 0, w = true;
      if (starts && aw && w && !taken) begin_measurement();
      if (lite_.b) {
        LITE(bready) = 0;
        if (lite_.bresp != kOkay) fail("register write answered with an error");
        return;
      }
    }
    fail("register write was not answered");
  }

  // Program to interrupt. Returns false if the cycle limit came first.
  bool run() {
    if (read(SUMMAND_REG_ID) != SUMMAND_ID) fail("register ID is not Summand's");
    const uint64_t digest = read(SUMMAND_REG_DIGEST_LOW) | static_cast<uint64_t>(read(SUMMAND_REG_DIGEST_HIGH)) << 32;
    if (digest != SUMMAND_CONFIG_DIGEST) fail("digest register is not that of the build");
    write_wide(SUMMAND_REG_MEMORY_BASE_LOW, SUMMAND_REG_MEMORY_BASE_HIGH, options_.base);
    write_wide(SUMMAND_REG_MEMORY_BYTES_LOW, SUMMAND_REG_MEMORY_BYTES_HIGH, options_.bytes ? options_.bytes : memory_.size());
    write_wide(SUMMAND_REG_PROGRAM_LOW, SUMMAND_REG_PROGRAM_HIGH, options_.program);
    write(SUMMAND_REG_PROGRAM_COUNT, options_.count);
    if (options_.set_watchdog) write(SUMMAND_REG_WATCHDOG_CYCLES, static_cast<uint32_t>(options_.watchdog));
    write(SUMMAND_REG_IRQ_ENABLE, 3);
    const auto begin = std::chrono::steady_clock::now();
    auto told = begin;
    write(SUMMAND_REG_CONTROL, 1, true);
    while (!irq_cycle_ && cycle_ - start_cycle_ < options_.limit) {
      tick();
      if (cycle_ % 4096 == 0) {
        const auto now = std::chrono::steady_clock::now();
        if (now - told > std::chrono::milliseconds(300)) {
          told = now;
          std::fprintf(stderr, "progress %llu %u\n", static_cast<unsigned long long>(cycle_ - start_cycle_), last_mark_);
          std::fflush(stderr);
        }
      }
    }
    wall_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    simulated_ = cycle_ - start_cycle_;
    const bool finished = irq_cycle_ != 0;
    measuring_ = false;
    // What is still in flight, or comes too much, shows within this time.
    for (unsigned n = 0; n < 100 + options_.latency + options_.write_latency; n++) tick();
    if (finished && (!reads_.empty() || !writes_.empty() || !data_.empty() || !responses_.empty()))
      complain("the interrupt came while transfers were in flight");
    return finished;
  }

  void report(bool finished) {
    std::printf("{\"finished\": %s, \"cycles\": %llu, \"wall_seconds\": %.6f, \"eval_seconds\": %.6f,\n \"simulated_cycles\": %llu,\n",
                finished ? "true" : "false", ull(irq_cycle_ ? irq_cycle_ - start_cycle_ : 0), wall_, eval_, ull(simulated_));
    std::printf(" \"read_beats\": %llu, \"write_beats\": %llu, \"protocol_violations\": %llu, \"protocol\": \"%s\",\n",
                ull(read_beats_), ull(write_beats_), ull(violations_), protocol_.c_str());
    std::printf(" \"registers\": {");
    const struct { const char* name; uint32_t offset; } shown[] = {
        {"STATUS", SUMMAND_REG_STATUS}, {"IRQ_STATUS", SUMMAND_REG_IRQ_STATUS}, {"ERROR_CODE", SUMMAND_REG_ERROR_CODE},
        {"ERROR_ADDRESS_LOW", SUMMAND_REG_ERROR_ADDRESS_LOW}, {"ERROR_ADDRESS_HIGH", SUMMAND_REG_ERROR_ADDRESS_HIGH},
        {"MARK", SUMMAND_REG_MARK},
        {"CYCLES", SUMMAND_REG_CYCLES}, {"EXECUTE_ISSUE", SUMMAND_REG_EXECUTE_ISSUE},
        {"EXECUTE_WAIT_LOAD", SUMMAND_REG_EXECUTE_WAIT_LOAD}, {"EXECUTE_WAIT_STORE", SUMMAND_REG_EXECUTE_WAIT_STORE},
        {"EXECUTE_WAIT_WEIGHTS", SUMMAND_REG_EXECUTE_WAIT_WEIGHTS}, {"EXECUTE_IDLE", SUMMAND_REG_EXECUTE_IDLE},
        {"LOAD_BUSY", SUMMAND_REG_LOAD_BUSY}, {"LOAD_WAIT_TOKEN", SUMMAND_REG_LOAD_WAIT_TOKEN},
        {"STORE_BUSY", SUMMAND_REG_STORE_BUSY}, {"STORE_WAIT_TOKEN", SUMMAND_REG_STORE_WAIT_TOKEN},
        {"READ_BEATS", SUMMAND_REG_READ_BEATS}, {"WRITE_BEATS", SUMMAND_REG_WRITE_BEATS},
        {"INSTRUCTIONS", SUMMAND_REG_INSTRUCTIONS},
        {"EXECUTE_WAIT_COEFFICIENTS", SUMMAND_REG_EXECUTE_WAIT_COEFFICIENTS},
        {"SATURATIONS", SUMMAND_REG_SATURATIONS}};
    const char* comma = "";
    for (const auto& r : shown) {
      std::printf("%s\"%s\": %u", comma, r.name, read(r.offset));
      comma = ", ";
    }
    std::printf("},\n \"marks\": [");
    comma = "";
    for (const Mark& m : marks_) {
      std::printf("%s\n  {\"mark\": %u, \"cycle\": %llu, \"read_beats\": %llu, \"write_beats\": %llu, \"execute\": [", comma,
                  m.mark, ull(m.cycle), ull(m.read_beats), ull(m.write_beats));
      for (unsigned n = 0; n < kExecuteStates; n++) std::printf("%s%llu", n ? ", " : "", ull(m.execute[n]));
      std::printf("]}");
      comma = ",";
    }
    std::printf("]}\n");
  }

 private:
  static constexpr int kLiteCycles = 1000;
  static unsigned long long ull(uint64_t value) { return value; }

  void write_wide(uint32_t low, uint32_t high, uint64_t value) {
    write(low, static_cast<uint32_t>(value));
    write(high, static_cast<uint32_t>(value >> 32));
  }

  void begin_measurement() {
    measuring_ = true;
    start_cycle_ = cycle_ - 1;  // the cycle in which the bus took it
    read_beats_ = write_beats_ = 0;
    since_ = Mark{};
  }

  void complain(const std::string& text) {
    if (!violations_++) protocol_ = "cycle " + std::to_string(cycle_) + ": " + text;
  }

  void drive_memory() {
    const double p = options_.stall;
    AXI(arready) = reads_.size() < kBurstsAhead && !random_.chance(p);
    AXI(awready) = writes_.size() < kBurstsAhead && !random_.chance(p);
    AXI(wready) = data_.size() < kBeatsAhead && !random_.chance(p);
    if (!AXI(rvalid)) {
      if (!reads_.empty() && reads_.front().ready <= cycle_ && !random_.chance(p)) {
        const Burst& burst = reads_.front();
        const uint64_t at = burst.address + static_cast<uint64_t>(beat_) * kBeatBytes - options_.base;
        const bool inside = at < memory_.size();
        static const std::array<uint8_t, kBeatBytes> zeros{};
        put(AXI(rdata), inside ? &memory_[at] : zeros.data(), kBeatBytes);
        AXI(rid) = burst.id;
        AXI(rlast) = beat_ + 1 == burst.beats;
        AXI(rresp) = !inside ? kDecodeError : broken(burst) ? kSlaveError : kOkay;
        AXI(rvalid) = 1;
      } else if (p > 0) {  // what lies on an idle channel must not matter
        std::array<uint8_t, kBeatBytes> garbage;
        for (auto& byte : garbage) byte = static_cast<uint8_t>(random_.next() >> 33);
        put(AXI(rdata), garbage.data(), kBeatBytes);
        AXI(rlast) = random_.next() >> 40 & 1;
        AXI(rresp) = random_.next() >> 40 & 3;
      }
    }
    if (!AXI(bvalid) && !responses_.empty() && responses_.front().ready <= cycle_ && !random_.chance(p)) {
      AXI(bid) = responses_.front().id;
      AXI(bresp) = response_of(responses_.front());
      AXI(bvalid) = 1;
    }
  }

  bool broken(const Burst& burst) const {
    const uint64_t from = burst.address - options_.base;
    return options_.error_offset >= from && options_.error_offset - from < static_cast<uint64_t>(burst.beats) * kBeatBytes;
  }

  uint8_t response_of(const Burst& burst) const {
    const uint64_t from = burst.address - options_.base;
    if (from >= memory_.size() || from + static_cast<uint64_t>(burst.beats) * kBeatBytes > memory_.size()) return kDecodeError;
    return broken(burst) ? kSlaveError : kOkay;
  }

  void check_burst(const char* channel, uint64_t address, unsigned beats, unsigned size, unsigned kind) {
    const std::string name = channel;
    if ((1u << size) != kBeatBytes) complain(name + " size is not the bus width");
    if (kind != 1) complain(name + " burst is not INCR");
    if (address % kBeatBytes) complain(name + " address is not on a beat");
    if (address / kPageBytes != (address + static_cast<uint64_t>(beats) * kBeatBytes - 1) / kPageBytes)
      complain(name + " burst crosses 4 KiB");
    const uint64_t from = address - options_.base, bytes = options_.bytes ? options_.bytes : memory_.size();
    if (from >= bytes || from + static_cast<uint64_t>(beats) * kBeatBytes > bytes)
      complain(name + " burst leaves the memory");
  }

  static std::string words(std::initializer_list<uint64_t> values) {
    return {reinterpret_cast<const char*>(values.begin()), values.size() * sizeof(uint64_t)};
  }

  void watch() {
    // Text is compared only while something is held back, so the fast case stays fast.
    const auto see = [this](Watcher& watcher, bool valid, bool ready, std::initializer_list<uint64_t> values) {
      const std::string wrong = watcher.observe(valid, ready, valid ? words(values) : std::string());
      if (!wrong.empty()) complain(wrong);
    };
    see(watch_ar_, AXI(arvalid), AXI(arready), {AXI(araddr), AXI(arlen), AXI(arid), AXI(arsize)});
    see(watch_aw_, AXI(awvalid), AXI(awready), {AXI(awaddr), AXI(awlen), AXI(awid), AXI(awsize)});
    std::string payload;
    if (AXI(wvalid)) {
      payload.resize(sizeof AXI(wdata) + sizeof AXI(wstrb) + 1);
      std::memcpy(&payload[0], &AXI(wdata), sizeof AXI(wdata));
      std::memcpy(&payload[sizeof AXI(wdata)], &AXI(wstrb), sizeof AXI(wstrb));
      payload.back() = AXI(wlast);
    }
    const std::string wrong = watch_w_.observe(AXI(wvalid), AXI(wready), payload);
    if (!wrong.empty()) complain(wrong);
  }

  void sample_memory() {
    if (AXI(arvalid) || AXI(awvalid) || AXI(wvalid) || held_) watch();
    held_ = (AXI(arvalid) && !AXI(arready)) || (AXI(awvalid) && !AXI(awready)) || (AXI(wvalid) && !AXI(wready));
    taken_r_ = AXI(rvalid) && AXI(rready);
    taken_b_ = AXI(bvalid) && AXI(bready);
    if (AXI(arvalid) && AXI(arready)) {
      check_burst("AR", AXI(araddr), AXI(arlen) + 1u, AXI(arsize), AXI(arburst));
      reads_.push_back({AXI(araddr), AXI(arlen) + 1u, AXI(arid), cycle_ + options_.latency});
    }
    if (AXI(awvalid) && AXI(awready)) {
      check_burst("AW", AXI(awaddr), AXI(awlen) + 1u, AXI(awsize), AXI(awburst));
      writes_.push_back({AXI(awaddr), AXI(awlen) + 1u, AXI(awid), 0});
    }
    if (AXI(wvalid) && AXI(wready)) {
      Beat beat;
      get(AXI(wdata), beat.data.data(), kBeatBytes);
      get(AXI(wstrb), beat.strobe.data(), beat.strobe.size());
      beat.last = AXI(wlast);
      data_.push_back(beat);
      write_beats_++, since_.write_beats++;
    }
    while (!writes_.empty() && !data_.empty()) store_beat();
    if (taken_r_) {
      read_beats_++, since_.read_beats++;
      if (++beat_ == reads_.front().beats) reads_.pop_front(), beat_ = 0;
    }
    if (taken_b_) responses_.pop_front();
  }

  void store_beat() {
    Burst& burst = writes_.front();
    const Beat& beat = data_.front();
    const uint64_t at = burst.address + static_cast<uint64_t>(stored_) * kBeatBytes - options_.base;
    if (at < memory_.size() && !broken(burst))
      for (unsigned n = 0; n < kBeatBytes; n++)
        if (beat.strobe[n / 8] >> n % 8 & 1) memory_[at + n] = beat.data[n];
    const bool last = ++stored_ == burst.beats;
    if (beat.last != last) complain("WLAST is not on the last beat");
    data_.pop_front();
    if (last) {
      burst.ready = cycle_ + options_.write_latency;
      responses_.push_back(burst);
      writes_.pop_front();
      stored_ = 0;
    }
  }

  // The design alone; with --profile its time is taken, which is what a bare loop around it would need.
  void evaluate() {
    if (!options_.profile) {
      dut_->eval();
      return;
    }
    const auto begin = std::chrono::steady_clock::now();
    dut_->eval();
    if (measuring_) eval_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  // One whole clock cycle.
  void tick() {
    drive_memory();
    dut_->clk = 0;
    evaluate();
    record(2 * cycle_);
    lite_ = {LITE(awvalid) && LITE(awready), LITE(wvalid) && LITE(wready), LITE(bvalid) && LITE(bready),
             LITE(arvalid) && LITE(arready), LITE(rvalid) && LITE(rready), LITE(bresp), LITE(rresp), LITE(rdata)};
    sample_memory();
    if (measuring_) {
      since_.execute[dut_->trace___05Fexecute & (kExecuteStates - 1)]++;
      if (dut_->trace___05Fmark_valid) {
        last_mark_ = since_.mark = dut_->trace___05Fmark;
        since_.cycle = cycle_ - start_cycle_;
        marks_.push_back(since_);
        since_ = Mark{};
      }
      if (dut_->irq && !irq_cycle_) irq_cycle_ = cycle_;
    }
    dut_->clk = 1;
    evaluate();
    record(2 * cycle_ + 1);
    if (taken_r_) AXI(rvalid) = 0;
    if (taken_b_) AXI(bvalid) = 0;
    cycle_++;
  }

  void record(uint64_t time) {
#if VM_TRACE_FST
    if (trace_) trace_->dump(time);
#else
    (void)time;
#endif
  }

  struct Lite {
    bool aw, w, b, ar, r;
    uint8_t bresp, rresp;
    uint32_t rdata;
  };

  const Options options_;
  Random random_;
  std::unique_ptr<VerilatedContext> context_;
  std::unique_ptr<Vdut> dut_;
#if VM_TRACE_FST
  std::unique_ptr<VerilatedFstC> trace_;
#endif
  std::vector<uint8_t> memory_;
  std::deque<Burst> reads_, writes_, responses_;
  std::deque<Beat> data_;
  unsigned beat_ = 0, stored_ = 0, last_mark_ = 0;
  bool taken_r_ = false, taken_b_ = false, measuring_ = false, held_ = false;
  Lite lite_{};
  uint64_t cycle_ = 1, start_cycle_ = 0, irq_cycle_ = 0, read_beats_ = 0, write_beats_ = 0, violations_ = 0, simulated_ = 0;
  double wall_ = 0, eval_ = 0;
  std::string protocol_;
  Watcher watch_ar_{"AR"}, watch_aw_{"AW"}, watch_w_{"W"};
  Mark since_{};
  std::vector<Mark> marks_;
};

Options parse(int argc, char** argv) {
  Options o;
  for (int n = 1; n + 1 < argc; n += 2) {
    const std::string key = argv[n];
    const char* value = argv[n + 1];
    const auto integer = [&] { return std::strtoull(value, nullptr, 0); };
    if (key == "--memory") o.memory = value;
    else if (key == "--dump") o.dump = value;
    else if (key == "--waves") o.waves = value;
    else if (key == "--base") o.base = integer();
    else if (key == "--bytes") o.bytes = integer();
    else if (key == "--program") o.program = integer();
    else if (key == "--count") o.count = static_cast<unsigned>(integer());
    else if (key == "--watchdog") o.watchdog = integer(), o.set_watchdog = true;
    else if (key == "--latency") o.latency = static_cast<unsigned>(integer());
    else if (key == "--write-latency") o.write_latency = static_cast<unsigned>(integer());
    else if (key == "--stall") o.stall = std::strtod(value, nullptr);
    else if (key == "--seed") o.seed = integer();
    else if (key == "--limit") o.limit = integer();
    else if (key == "--profile") o.profile = integer() != 0;
    else if (key == "--error-offset") o.error_offset = integer();
    else fail("unknown option " + key);
  }
  if (argc % 2 == 0) fail("every option needs a value");
  return o;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    Bench bench(options);
    bench.load();
    bench.reset();
    const bool finished = bench.run();
    bench.report(finished);
    bench.dump();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error %s\n", error.what());
    return 3;
  }
}
