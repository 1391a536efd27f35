// A libp2p peer for peerup's interop tests, built on go-libp2p: TCP, Noise and yamux on loopback only.
//
// Commands come as lines of JSON on standard input, each with an "id" and a "do"; answers go to standard output as
// lines of JSON with the same "id", "ok" and, where not ok, "error". The first line out is {"event":"ready",…}. Commands
// run side by side. The peer ends when standard input does. The commands are described in ../README.md; the peer on
// js-libp2p beside this one understands the same.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
)

// As the other program of that name says it; nothing may be concluded from it.
const agent = "peerup/0.4.1"

type request struct {
	ID        int     `json:"id"`
	Do        string  `json:"do"`
	Address   string  `json:"address"`
	Peer      string  `json:"peer"`
	Protocol  string  `json:"protocol"`
	Behaviour string  `json:"behaviour"`
	Timeout   float64 `json:"timeout"` // seconds
	Count     int     `json:"count"`
	Of        int     `json:"of"`
	Bytes     int64   `json:"bytes"`
	Code      uint32  `json:"code"`
	exchangeOptions
	relayOptions
}

type answer map[string]any

type node struct {
	host     host.Host
	out      sync.Mutex
	mutex    sync.Mutex
	services map[string]*service
	running  map[int]*progress // by id of the exchange command
	circuits circuitAddresses
}

func (n *node) say(value any) {
	n.out.Lock()
	defer n.out.Unlock()
	if err := json.NewEncoder(os.Stdout).Encode(value); err != nil {
		os.Exit(1) // nobody listens any more
	}
}

func (n *node) run(r request) {
	timeout := 30 * time.Second
	if r.Timeout > 0 {
		timeout = time.Duration(r.Timeout * float64(time.Second))
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	result, err := n.do(ctx, r)
	if result == nil {
		result = answer{}
	}
	if err != nil {
		result["error"] = err.Error()
	}
	_, failed := result["error"]
	result["id"], result["ok"] = r.ID, !failed
	n.say(result)
}

func (n *node) do(ctx context.Context, r request) (answer, error) {
	var id peer.ID
	if r.Peer != "" {
		var err error
		if id, err = peer.Decode(r.Peer); err != nil {
			return nil, err
		}
	}
	switch r.Do {
	case "dial":
		return n.dial(ctx, r.Address)
	case "disconnect":
		return nil, n.host.Network().ClosePeer(id)
	case "connections":
		return n.connections(), nil
	case "wait-closed":
		return nil, n.waitClosed(ctx, id)
	case "identify":
		return n.identify(ctx, id)
	case "ping":
		return n.ping(ctx, id, max(r.Count, 1))
	case "exchange":
		return n.exchanges(ctx, r.ID, id, r.Protocol, r.Count, r.exchangeOptions)
	case "relay-serve":
		return nil, n.relayServe(r.relayOptions)
	case "reserve":
		return n.reserve(ctx, r.Address)
	case "progress":
		return n.progress(r.Of)
	case "serve":
		return nil, n.serve(r.Protocol, r.Behaviour, r.Bytes, r.Code)
	case "release":
		return nil, n.release(r.Protocol, r.Of)
	case "served":
		return n.served(r.Protocol)
	}
	return nil, fmt.Errorf("no such command: %q", r.Do)
}

func (n *node) dial(ctx context.Context, address string) (answer, error) {
	info, err := peer.AddrInfoFromString(address)
	if err != nil {
		return nil, err
	}
	ctx = n.dialContext(ctx, address, info.ID)
	n.host.Peerstore().ClearAddrs(info.ID)
	n.host.Peerstore().AddAddrs(info.ID, info.Addrs, peerstore.PermanentAddrTTL)
	connection, err := n.host.Network().DialPeer(ctx, info.ID)
	if err != nil {
		return nil, err
	}
	state := connection.ConnState()
	return describeCircuit(answer{
		"peer":      connection.RemotePeer().String(),
		"remote":    connection.RemoteMultiaddr().String(),
		"security":  state.Security,
		"muxer":     state.StreamMultiplexer,
		"early":     state.UsedEarlyMuxerNegotiation,
		"local":     connection.LocalMultiaddr().String(),
		"public":    fmt.Sprint(connection.RemotePublicKey().Type()),
		"transport": state.Transport,
	}, connection), nil
}

func (n *node) connections() answer {
	list := []answer{}
	for _, connection := range n.host.Network().Conns() {
		list = append(list, describeCircuit(answer{
			"peer":      connection.RemotePeer().String(),
			"direction": map[network.Direction]string{network.DirInbound: "inbound", network.DirOutbound: "outbound"}[connection.Stat().Direction],
			"remote":    connection.RemoteMultiaddr().String(),
			"security":  connection.ConnState().Security,
			"muxer":     connection.ConnState().StreamMultiplexer,
			"early":     connection.ConnState().UsedEarlyMuxerNegotiation,
			"streams":   len(connection.GetStreams()),
		}, connection))
	}
	return answer{"connections": list}
}

// waitClosed returns when there is no connection to the peer.
func (n *node) waitClosed(ctx context.Context, id peer.ID) error {
	changed := make(chan struct{}, 1)
	watcher := &network.NotifyBundle{DisconnectedF: func(network.Network, network.Conn) {
		select {
		case changed <- struct{}{}:
		default:
		}
	}}
	n.host.Network().Notify(watcher)
	defer n.host.Network().StopNotify(watcher)
	for n.host.Network().Connectedness(id) != network.NotConnected {
		select {
		case <-changed:
		case <-ctx.Done():
			return errors.New("still connected")
		}
	}
	return nil
}

func (n *node) ping(ctx context.Context, id peer.ID, count int) (answer, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ctx = network.WithAllowLimitedConn(ctx, "interop test")
	results := ping.Ping(ctx, n.host, id)
	seconds := []float64{}
	for len(seconds) < count {
		select {
		case result, open := <-results:
			if !open {
				return nil, errors.New("the ping stream ended")
			}
			if result.Error != nil {
				return nil, result.Error
			}
			seconds = append(seconds, result.RTT.Seconds())
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return answer{"seconds": seconds}, nil
}

// makeKey derives a key from the seed, the same at each start; only Ed25519 keys can be derived.
func makeKey(kind, seed string) (crypto.PrivKey, error) {
	if seed != "" {
		if kind != "ed25519" {
			return nil, errors.New("only an ed25519 key can be made from a seed")
		}
		digest := sha256.Sum256([]byte(seed))
		key, _, err := crypto.GenerateEd25519Key(&repeating{digest[:], 0})
		return key, err
	}
	number, known := map[string]int{"ed25519": crypto.Ed25519, "rsa": crypto.RSA, "ecdsa": crypto.ECDSA, "secp256k1": crypto.Secp256k1}[kind]
	if !known {
		return nil, fmt.Errorf("no such kind of key: %s", kind)
	}
	key, _, err := crypto.GenerateKeyPair(number, 2048)
	return key, err
}

type repeating struct {
	content []byte
	at      int
}

func (r *repeating) Read(buffer []byte) (int, error) {
	for i := range buffer {
		buffer[i] = r.content[r.at%len(r.content)]
		r.at++
	}
	return len(buffer), nil
}

func libraryVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dependency := range info.Deps {
			if dependency.Path == "github.com/libp2p/go-libp2p" {
				return "go-libp2p " + dependency.Version
			}
		}
	}
	return "go-libp2p"
}

func main() {
	kind := flag.String("key", "ed25519", "kind of identity key: ed25519, rsa, ecdsa, secp256k1")
	seed := flag.String("seed", "", "derive the identity key from this text")
	noListen := flag.Bool("no-listen", false, "accept no connections but through relays")
	var sockets webSockets
	sockets.flags()
	flag.Parse()
	key, err := makeKey(*kind, *seed)
	if err != nil {
		fatal(err)
	}
	listen := libp2p.ListenAddrStrings(sockets.listen)
	if *noListen {
		listen = libp2p.NoListenAddrs
	}
	n := &node{services: map[string]*service{}, running: map[int]*progress{}}
	h, err := libp2p.New(
		libp2p.Identity(key),
		listen,
		libp2p.Transport(tcp.NewTCPTransport),
		sockets.transport(),
		libp2p.Security(noise.ID, noise.New),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		libp2p.UserAgent(agent),
		libp2p.ResourceManager(&network.NullResourceManager{}),
		libp2p.EnableRelay(),
		libp2p.AddrsFactory(n.circuits.with),
		libp2p.DisableMetrics(),
	)
	if err != nil {
		fatal(err)
	}
	n.host = h
	addresses := []string{}
	for _, address := range h.Network().ListenAddresses() {
		if isCircuit(address.String()) {
			continue // ready to be used once there is a reservation
		}
		addresses = append(addresses, fmt.Sprintf("%s/p2p/%s", address, h.ID()))
	}
	n.say(answer{"event": "ready", "peer": h.ID().String(), "addresses": addresses, "library": libraryVersion()})
	lines := bufio.NewReader(os.Stdin)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			fatal(err)
		}
		var r request
		if err := json.Unmarshal(line, &r); err != nil {
			fatal(err)
		}
		go n.run(r)
	}
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
