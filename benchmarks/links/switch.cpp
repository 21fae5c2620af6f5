// The switch between the namespaces of benchmarks/links: every rank's TUN device ends here, and a packet reaches the other rank's when a
// real network would bring it there. Time is booked, not waited for: a port that is free at t carries n bytes until t + n * ns_per_byte,
// whenever this process gets to run, so that a late wake-up shifts one packet and never costs rate.
//
// A packet passes two ports. The sender's is booked when the packet is read; the receiver's only when it has left the sender's, by an
// event of that time: booked at once, a packet that still waits at its sender would hold up those of other senders that leave before it,
// and every many-to-one exchange would look slow. Bits flow through: an idle receiver's port has the last bit when it leaves the sender.
// Segmentation is left to the network (vnet headers): what TCP hands over in one piece travels in one piece, counted as the packets it is.
// guard.py mirrors Port and Totals.

#include <poll.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <queue>
#include <vector>

namespace {

constexpr int kBatch = 32;                         // packets read from one port before the others and the due ones get their turn

// struct virtio_net_hdr, which <linux/virtio_net.h> has too, in words that are not C++.
struct VnetHeader {
    uint8_t flags, gso_type;
    uint16_t header_length, gso_size, checksum_start, checksum_offset;
};
constexpr int kVnet = sizeof(VnetHeader);
static_assert(kVnet == 10);
constexpr int kLargest = 65536 + kVnet;
constexpr int kTcpHeader = 20;
constexpr int64_t kNever = INT64_MAX;

struct Port {
    int32_t fd;                                    // of the rank's TUN device, non-blocking, IFF_VNET_HDR
    uint32_t address;                              // IPv4, as it stands in a packet
    int64_t sent_packets, sent_bytes;              // what the rank gave, drops included; IP bytes, as the wire would carry them
    int64_t received_packets, received_bytes;      // what the rank got
    int64_t dropped_sending, dropped_receiving;    // packets for which the port's queue was full
    int64_t unknown;                               // packets for nobody here
    int64_t queued_ns;                             // longest wait for the receiving port
};

struct Totals {
    int64_t pieces;                                // deliveries; a piece is one or more packets of one TCP stream
    int64_t late_ns;                               // by how much they came after their time, summed
    int64_t latest_ns;
    int64_t wakes;
};

struct Piece {
    std::unique_ptr<uint8_t[]> bytes;              // vnet header, IP header, ...
    int length, packets, wire_bytes, to;
};

struct Event {
    int64_t at;
    uint64_t order;                                // packets of one time keep the order they came in
    Piece* piece;
    bool operator<(const Event& other) const { return at != other.at ? at > other.at : order > other.order; }
};

int64_t clock_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

// Packets and bytes on the wire: a piece of TCP longer than the segment size is that many packets, each with its own headers.
void count_wire(Piece& piece) {
    VnetHeader vnet;
    std::memcpy(&vnet, piece.bytes.get(), kVnet);
    const uint8_t* packet = piece.bytes.get() + kVnet;
    const int length = piece.length - kVnet;
    piece.packets = 1, piece.wire_bytes = length;
    if (vnet.gso_type == 0 || vnet.gso_size == 0) return;
    const int ip_header = (packet[0] & 15) * 4;
    if (length < ip_header + kTcpHeader) return;
    const int headers = ip_header + (packet[ip_header + 12] >> 4) * 4;
    if (length <= headers) return;
    piece.packets = (length - headers + vnet.gso_size - 1) / vnet.gso_size;
    piece.wire_bytes = length + (piece.packets - 1) * headers;
}

class Switch {
public:
    Switch(Port* ports, int count, Totals* totals, double ns_per_byte, int64_t delay_ns, int64_t sending_ns, int64_t receiving_ns)
        : ports_(ports), count_(count), totals_(totals), ns_per_byte_(ns_per_byte), delay_ns_(delay_ns), sending_ns_(sending_ns),
          receiving_ns_(receiving_ns), sending_free_(count, 0), receiving_free_(count, 0), buffer_(new uint8_t[kLargest]) {}

    ~Switch() {
        for (auto* events : {&leaving_, &arriving_})
            for (; !events->empty(); events->pop()) delete events->top().piece;
    }

    int run(int stop_fd) {
        std::vector<pollfd> watched(count_ + 1);
        for (int port = 0; port < count_; ++port) watched[port] = {ports_[port].fd, POLLIN, 0};
        watched[count_] = {stop_fd, POLLIN, 0};
        for (;;) {
            // What leaves a sender's port decides about nothing before it has crossed the network: no wake-up for that alone.
            int64_t due = kNever;
            if (!leaving_.empty()) due = leaving_.top().at + delay_ns_;
            if (!arriving_.empty()) due = std::min(due, arriving_.top().at);
            const bool waiting = due != kNever;
            const int64_t rest = waiting ? std::max<int64_t>(0, due - clock_ns()) : 0;
            const timespec timeout = {rest / 1000000000, rest % 1000000000};
            if (ppoll(watched.data(), watched.size(), waiting ? &timeout : nullptr, nullptr) < 0 && errno != EINTR) return errno;
            ++totals_->wakes;
            if (watched[count_].revents) return 0;
            for (int port = 0; port < count_; ++port)
                if (watched[port].revents)
                    if (const int error = receive(port)) return error;
            const int64_t now = clock_ns();
            for (; !leaving_.empty() && leaving_.top().at <= now; leaving_.pop()) leave(leaving_.top());
            for (; !arriving_.empty() && arriving_.top().at <= now; arriving_.pop()) deliver(arriving_.top(), now);
        }
    }

private:
    int receive(int from) {
        Port& port = ports_[from];
        for (int turn = 0; turn < kBatch; ++turn) {
            const ssize_t length = read(port.fd, buffer_.get(), kLargest);
            if (length < 0) return errno == EAGAIN || errno == EINTR ? 0 : errno;
            const uint8_t* packet = buffer_.get() + kVnet;
            const int to = length >= kVnet + 20 && packet[0] >> 4 == 4 ? port_of(packet + 16) : -1;
            if (to < 0 || to == from) {
                ++port.unknown;
                continue;
            }
            auto piece = std::make_unique<Piece>();
            piece->bytes.reset(new uint8_t[length]);
            std::memcpy(piece->bytes.get(), buffer_.get(), length);
            piece->length = static_cast<int>(length), piece->to = to;
            count_wire(*piece);
            port.sent_packets += piece->packets, port.sent_bytes += piece->wire_bytes;
            const int64_t now = clock_ns(), start = std::max(now, sending_free_[from]);
            if (start - now > sending_ns_) {
                port.dropped_sending += piece->packets;
                continue;
            }
            sending_free_[from] = start + wire_ns(*piece);
            leaving_.push({sending_free_[from], order_++, piece.release()});
        }
        return 0;
    }

    void leave(const Event& event) {
        Port& port = ports_[event.piece->to];
        int64_t& free = receiving_free_[event.piece->to];
        const int64_t waited = std::max<int64_t>(0, free + wire_ns(*event.piece) - event.at);
        if (waited > receiving_ns_) {
            port.dropped_receiving += event.piece->packets;
            delete event.piece;
            return;
        }
        port.queued_ns = std::max(port.queued_ns, waited);
        free = event.at + waited;
        arriving_.push({free + delay_ns_, order_++, event.piece});
    }

    void deliver(const Event& event, int64_t now) {
        Port& port = ports_[event.piece->to];
        const int packets = event.piece->packets, wire_bytes = event.piece->wire_bytes;
        const bool taken = write(port.fd, event.piece->bytes.get(), event.piece->length) == event.piece->length;
        delete event.piece;
        if (!taken) {                              // the rank's interface is down, or its kernel is out of memory
            port.dropped_receiving += packets;
            return;
        }
        port.received_packets += packets, port.received_bytes += wire_bytes;
        ++totals_->pieces;
        totals_->late_ns += now - event.at, totals_->latest_ns = std::max(totals_->latest_ns, now - event.at);
    }

    int port_of(const uint8_t* address) const {
        uint32_t wanted;
        std::memcpy(&wanted, address, sizeof wanted);
        for (int port = 0; port < count_; ++port)
            if (ports_[port].address == wanted) return port;
        return -1;
    }

    int64_t wire_ns(const Piece& piece) const { return static_cast<int64_t>(piece.wire_bytes * ns_per_byte_); }

    Port* ports_;
    int count_;
    Totals* totals_;
    double ns_per_byte_;
    int64_t delay_ns_, sending_ns_, receiving_ns_;     // the latter two: longest waits for the two ports
    std::vector<int64_t> sending_free_, receiving_free_;
    std::priority_queue<Event> leaving_, arriving_;    // their senders' ports; at their receivers
    uint64_t order_ = 0;
    std::unique_ptr<uint8_t[]> buffer_;
};

}  // namespace

// Switches until stop_fd is readable: 0, or the errno that ended it. The counters of ports and totals may be read meanwhile.
extern "C" __attribute__((visibility("default"))) int switch_run(
    Port* ports, int count, Totals* totals, double ns_per_byte, int64_t delay_ns, int64_t sending_ns, int64_t receiving_ns, int stop_fd) {
    prctl(PR_SET_TIMERSLACK, 1);                   // the default lets a wake-up slip by 50 us
    try {
        return Switch(ports, count, totals, ns_per_byte, delay_ns, sending_ns, receiving_ns).run(stop_fd);
    } catch (const std::bad_alloc&) {
        return ENOMEM;
    }
}
