package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/multiformats/go-multiaddr"
)

const unlimited = 1 << 40 // bytes or seconds, for the one limit of two that is not wanted

// relayOptions says what a relay grants; 0 stands for no limit, and for the library's own number where there must be one.
type relayOptions struct {
	Data         int64 `json:"data"`         // bytes of each direction of a circuit
	Seconds      int64 `json:"seconds"`      // duration of a circuit
	Reservations int   `json:"reservations"` // so many at once
	TTL          int64 `json:"ttl"`          // seconds that a reservation is valid
	Announce     bool  `json:"announce"`     // tell addresses on loopback, too
}

// circuitAddresses are where our relays accept connections for us; identify tells of them.
type circuitAddresses struct {
	mutex sync.Mutex
	list  []multiaddr.Multiaddr
}

func (c *circuitAddresses) with(others []multiaddr.Multiaddr) []multiaddr.Multiaddr {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return append(append([]multiaddr.Multiaddr{}, others...), c.list...)
}

func (c *circuitAddresses) add(address multiaddr.Multiaddr) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if !multiaddr.Contains(c.list, address) {
		c.list = append(c.list, address)
	}
}

// relayServe makes this peer a relay for everybody.
func (n *node) relayServe(o relayOptions) error {
	resources := relay.DefaultResources()
	// All tests are on one host.
	resources.MaxReservationsPerIP, resources.MaxReservationsPerASN, resources.MaxCircuits = 1000, 1000, 1000
	if o.Reservations > 0 {
		resources.MaxReservations = o.Reservations
	}
	if o.TTL > 0 {
		resources.ReservationTTL = time.Duration(o.TTL) * time.Second
	}
	resources.Limit = nil
	if o.Data > 0 || o.Seconds > 0 {
		limit := relay.RelayLimit{Data: unlimited, Duration: 24 * time.Hour}
		if o.Data > 0 {
			limit.Data = o.Data
		}
		if o.Seconds > 0 {
			limit.Duration = time.Duration(o.Seconds) * time.Second
		}
		resources.Limit = &limit
	}
	options := []relay.Option{relay.WithResources(resources)}
	if o.Announce {
		options = append(options, relay.WithReservationAddressFilter(func(multiaddr.Multiaddr) bool { return true }))
	}
	_, err := relay.New(n.host, options...)
	return err
}

// reserve asks the relay at this address for a reservation; circuits from there are accepted in any case.
func (n *node) reserve(ctx context.Context, address string) (answer, error) {
	info, err := peer.AddrInfoFromString(address)
	if err != nil {
		return nil, err
	}
	reservation, err := client.Reserve(ctx, n.host, *info)
	if err != nil {
		var refused client.ReservationError
		if errors.As(err, &refused) {
			return answer{"status": refused.Status.String(), "reason": refused.Reason}, err
		}
		return nil, err
	}
	// A go-libp2p relay tells its public addresses alone, unless told otherwise, hence none of those on loopback.
	relays := reservation.Addrs
	if len(relays) == 0 {
		whole, err := multiaddr.NewMultiaddr(address)
		if err != nil {
			return nil, err
		}
		relays = []multiaddr.Multiaddr{whole}
	}
	texts := []string{}
	for _, relay := range relays {
		circuit := relay.Encapsulate(multiaddr.StringCast("/p2p-circuit"))
		n.circuits.add(circuit)
		texts = append(texts, fmt.Sprintf("%s/p2p/%s", circuit, n.host.ID()))
	}
	return answer{
		"addresses": texts,
		"told":      len(reservation.Addrs),
		"expire":    reservation.Expiration.Unix(),
		"seconds":   int64(reservation.LimitDuration / time.Second),
		"data":      reservation.LimitData,
		"voucher":   reservation.Voucher != nil, // go-libp2p has verified it, or failed
	}, nil
}

func isCircuit(address string) bool { return strings.Contains(address, "/p2p-circuit") }

// dialContext lets a dial use the address that it is given, whatever it is and whatever happened before.
func (n *node) dialContext(ctx context.Context, address string, id peer.ID) context.Context {
	// Back-off after a failure would answer the next dial without dialling.
	n.host.Network().(*swarm.Swarm).Backoff().Clear(id)
	if isCircuit(address) {
		return network.WithAllowLimitedConn(ctx, "interop test")
	}
	return network.WithForceDirectDial(ctx, "interop test")
}

// open opens a stream on a connection that there is, direct or not.
func (n *node) open(ctx context.Context, id peer.ID, name protocol.ID) (network.Stream, error) {
	ctx = network.WithAllowLimitedConn(network.WithNoDial(ctx, "connected already"), "interop test")
	return n.host.NewStream(ctx, id, name)
}

// describeCircuit tells what a connection is limited to, if it is.
func describeCircuit(into answer, connection network.Conn) answer {
	stat := connection.Stat()
	into["relayed"] = isCircuit(connection.RemoteMultiaddr().String())
	into["limited"] = stat.Limited
	if duration, known := stat.Extra[client.StatLimitDuration].(time.Duration); known {
		into["seconds"] = int64(duration / time.Second)
	}
	if data, known := stat.Extra[client.StatLimitData].(uint64); known {
		into["data"] = data
	}
	return into
}
