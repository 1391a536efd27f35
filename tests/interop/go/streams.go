package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
)

// The content that streams carry: pseudo-random bytes with a prime period, so that lost, repeated or swapped blocks
// change the hash. Every implementation in this directory makes the same.
const (
	period    = 524287
	blockSize = 64 * 1024
)

var pattern = makePattern()

func makePattern() []byte {
	content := make([]byte, period+blockSize)
	state := uint32(2463534242)
	for i := range period {
		state ^= state << 13
		state ^= state >> 17
		state ^= state << 5
		content[i] = byte(state >> 24)
	}
	copy(content[period:], content)
	return content
}

// send writes `size` bytes of the content with this seed.
func send(w io.Writer, size int64, seed int64, sent *atomic.Int64, digest hash.Hash) error {
	start := (seed * 7919) % period
	for at := int64(0); at < size; {
		from := (start + at) % period
		block := pattern[from : from+min(blockSize, size-at)]
		written, err := w.Write(block)
		digest.Write(block[:written])
		sent.Add(int64(written))
		at += int64(written)
		if err != nil {
			return err
		}
	}
	return nil
}

// receive reads to the end, or to `limit` bytes if that is not 0.
func receive(r io.Reader, limit int64, received *atomic.Int64, digest hash.Hash, head *[]byte) error {
	buffer := make([]byte, blockSize)
	for limit == 0 || received.Load() < limit {
		part := buffer
		if limit != 0 {
			part = buffer[:min(blockSize, limit-received.Load())]
		}
		count, err := r.Read(part)
		digest.Write(part[:count])
		if head != nil && len(*head) < 1024 {
			*head = append(*head, part[:min(count, 1024-len(*head))]...)
		}
		received.Add(int64(count))
		// Only the very value is an end: go-yamux wraps it in the error of a stream whose connection was closed.
		if err == io.EOF { //nolint:errorlint
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func hexDigest(digest hash.Hash) string { return hex.EncodeToString(digest.Sum(nil)) }

// outcome puts an error of a stream into words and numbers.
func outcome(into answer, err error) {
	var stream *network.StreamError
	into["reset"] = errors.Is(err, network.ErrReset)
	if errors.As(err, &stream) {
		into["reset"], into["code"], into["remote"] = true, uint32(stream.ErrorCode), stream.Remote
	}
	if err != nil {
		into["error"] = err.Error()
	}
}

type exchangeOptions struct {
	Text       string `json:"text"`         // sent first
	Send       int64  `json:"send"`         // then so many bytes of the content
	Seed       int64  `json:"seed"`         //
	After      int64  `json:"after"`        // so many more once the other side has finished
	KeepOpen   bool   `json:"keep_open"`    // do not half-close before the other side has finished
	ReadAtMost int64  `json:"read_at_most"` // then reset
	ResetAfter bool   `json:"reset_after"`  // reset with `reset_code` instead of the half-close
	ResetCode  uint32 `json:"reset_code"`
	Hold       bool   `json:"hold"` // read nothing until "release" with the id of the exchange in "of"
	Lazy       bool   `json:"lazy"` // send behind the proposal before it is answered
}

// progress counts bytes while they move; `gate` is closed by "release".
type progress struct {
	sent, received atomic.Int64
	gate           gate
}

// gate is shut until it is opened, once.
type gate struct {
	once sync.Once
	open chan struct{}
}

func newProgress() *progress { return &progress{gate: gate{open: make(chan struct{})}} }

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }

func (n *node) progress(of int) (answer, error) {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	p, known := n.running[of]
	if !known {
		return nil, fmt.Errorf("no exchange %d runs", of)
	}
	return answer{"sent": p.sent.Load(), "received": p.received.Load()}, nil
}

// exchanges runs `count` exchanges side by side with seeds that follow each other.
func (n *node) exchanges(ctx context.Context, id int, to peer.ID, name string, count int, o exchangeOptions) (answer, error) {
	count = max(count, 1)
	results := make([]answer, count)
	p := newProgress()
	n.mutex.Lock()
	n.running[id] = p
	n.mutex.Unlock()
	var group sync.WaitGroup
	for i := range count {
		mine := o
		mine.Seed += int64(i)
		group.Go(func() { results[i] = n.exchange(ctx, to, name, mine, p) })
	}
	group.Wait()
	if count == 1 {
		return results[0], nil
	}
	all := answer{"exchanges": results}
	for i, result := range results {
		if reason, failed := result["error"]; failed {
			all["error"] = fmt.Sprintf("exchange %d of %d: %v", i+1, count, reason)
		}
	}
	return all, nil
}

// awaitIdentify returns when the peer has told what it speaks, which replaces what was noted of it before.
func (n *node) awaitIdentify(ctx context.Context, of peer.ID) {
	for ctx.Err() == nil {
		if known, err := n.host.Peerstore().GetProtocols(of); err == nil && len(known) > 0 {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// exchange opens a stream, sends and reads at the same time, and reports both sides of it.
func (n *node) exchange(ctx context.Context, to peer.ID, name string, o exchangeOptions, p *progress) answer {
	result := answer{}
	started := time.Now()
	if o.Lazy { // as with a protocol that the peer has once said it speaks
		n.awaitIdentify(ctx, to)
		if err := n.host.Peerstore().AddProtocols(to, protocol.ID(name)); err != nil {
			return answer{"opened": false, "error": err.Error()}
		}
	}
	stream, err := n.open(ctx, to, protocol.ID(name))
	if err != nil {
		outcome(result, err)
		result["opened"] = false
		return result
	}
	result["opened"] = true
	deadline, _ := ctx.Deadline()
	_ = stream.SetDeadline(deadline)
	sentDigest, receivedDigest := sha256.New(), sha256.New()
	var head []byte
	var sendError error
	var mine progress
	done := make(chan struct{})
	go func() {
		defer close(done)
		sendError = n.sending(stream, o, &mine, p, sentDigest)
	}()
	if o.Hold {
		select {
		case <-p.gate.open:
		case <-ctx.Done():
		}
	}
	readError := receive(&countingReader{stream, &p.received}, o.ReadAtMost, &mine.received, receivedDigest, &head)
	if o.ReadAtMost != 0 && readError == nil {
		_ = stream.ResetWithError(network.StreamErrorCode(o.ResetCode))
	}
	<-done
	if o.After > 0 && sendError == nil {
		if sendError = send(stream, o.After, o.Seed, &mine.sent, sentDigest); sendError == nil {
			sendError = stream.CloseWrite()
		}
	}
	if readError == nil && sendError == nil {
		_ = stream.Close()
	} else {
		_ = stream.Reset()
	}
	failure := readError
	if failure == nil {
		failure = sendError
	}
	outcome(result, failure)
	result["sent"], result["sent_sha256"] = mine.sent.Load(), hexDigest(sentDigest)
	result["received"], result["received_sha256"] = mine.received.Load(), hexDigest(receivedDigest)
	result["head"] = base64.StdEncoding.EncodeToString(head)
	result["seconds"] = time.Since(started).Seconds()
	return result
}

func (n *node) sending(stream network.Stream, o exchangeOptions, mine, all *progress, digest hash.Hash) error {
	if o.Text != "" {
		if _, err := io.WriteString(stream, o.Text); err != nil {
			return err
		}
	}
	counter := io.Writer(&counting{stream, &all.sent})
	if err := send(counter, o.Send, o.Seed, &mine.sent, digest); err != nil {
		return err
	}
	switch {
	case o.ResetAfter:
		return stream.ResetWithError(network.StreamErrorCode(o.ResetCode))
	case o.KeepOpen || o.After > 0:
		return nil
	}
	return stream.CloseWrite()
}

type counting struct {
	io.Writer
	count *atomic.Int64
}

func (c *counting) Write(content []byte) (int, error) {
	written, err := c.Writer.Write(content)
	c.count.Add(int64(written))
	return written, err
}

type countingReader struct {
	io.Reader
	count *atomic.Int64
}

func (c *countingReader) Read(buffer []byte) (int, error) {
	count, err := c.Reader.Read(buffer)
	c.count.Add(int64(count))
	return count, err
}

// service is a protocol that we serve, and what became of each stream so far.
type service struct {
	behaviour string
	bytes     int64
	code      uint32
	mutex     sync.Mutex
	opened    int
	finished  []answer
	gate      gate
}

func (n *node) serve(name, behaviour string, bytes int64, code uint32) error {
	handlers := map[string]func(network.Stream, *service, *progress, hash.Hash) error{
		"echo": echo, "sink": sink, "hold": hold, "source": source, "reset": reset, "silent": silent,
	}
	handler, known := handlers[behaviour]
	if !known {
		return fmt.Errorf("no such behaviour: %q", behaviour)
	}
	s := &service{behaviour: behaviour, bytes: bytes, code: code, gate: gate{open: make(chan struct{})}}
	n.mutex.Lock()
	n.services[name] = s
	n.mutex.Unlock()
	n.host.SetStreamHandler(protocol.ID(name), func(stream network.Stream) {
		s.mutex.Lock()
		s.opened++
		s.mutex.Unlock()
		p, digest := &progress{}, sha256.New()
		err := handler(stream, s, p, digest)
		report := answer{"received": p.received.Load(), "sha256": hexDigest(digest), "sent": p.sent.Load()}
		outcome(report, err)
		if err == nil {
			_ = stream.Close()
		} else {
			_ = stream.Reset()
		}
		s.mutex.Lock()
		s.finished = append(s.finished, report)
		s.mutex.Unlock()
	})
	return nil
}

func (n *node) service(name string) (*service, error) {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	s, known := n.services[name]
	if !known {
		return nil, fmt.Errorf("%s is not served", name)
	}
	return s, nil
}

// release opens the gate of a protocol that we serve, or else of a running exchange.
func (n *node) release(name string, of int) error {
	if name != "" {
		s, err := n.service(name)
		if err == nil {
			s.gate.release()
		}
		return err
	}
	n.mutex.Lock()
	defer n.mutex.Unlock()
	p, known := n.running[of]
	if !known {
		return fmt.Errorf("no exchange %d runs", of)
	}
	p.gate.release()
	return nil
}

func (n *node) served(name string) (answer, error) {
	s, err := n.service(name)
	if err != nil {
		return nil, err
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return answer{"opened": s.opened, "finished": append([]answer{}, s.finished...)}, nil
}

// echo returns what it gets, and finishes when the other side has.
func echo(stream network.Stream, _ *service, p *progress, digest hash.Hash) error {
	err := receive(io.TeeReader(stream, &counting{stream, &p.sent}), 0, &p.received, digest, nil)
	if err != nil {
		return err
	}
	return stream.CloseWrite()
}

// sink reads to the end and answers with count and hash.
func sink(stream network.Stream, _ *service, p *progress, digest hash.Hash) error {
	if err := receive(stream, 0, &p.received, digest, nil); err != nil {
		return err
	}
	reply, err := json.Marshal(answer{"received": p.received.Load(), "sha256": hexDigest(digest)})
	if err != nil {
		return err
	}
	if _, err = stream.Write(reply); err != nil {
		return err
	}
	return stream.CloseWrite()
}

// hold is a sink that does not read before it is released.
func hold(stream network.Stream, s *service, p *progress, digest hash.Hash) error {
	<-s.gate.open
	return sink(stream, s, p, digest)
}

// source reads a line "SIZE SEED", sends that, half-closes, and then reads to the end.
func source(stream network.Stream, _ *service, p *progress, digest hash.Hash) error {
	var size, seed int64
	lines := bufio.NewReader(stream)
	line, err := lines.ReadString('\n')
	if err != nil {
		return err
	}
	if _, err = fmt.Sscanf(line, "%d %d\n", &size, &seed); err != nil {
		return err
	}
	if err = send(stream, size, seed, &p.sent, sha256.New()); err != nil {
		return err
	}
	if err = stream.CloseWrite(); err != nil {
		return err
	}
	return receive(lines, 0, &p.received, digest, nil)
}

// reset reads `bytes` bytes and then resets the stream with `code`.
func reset(stream network.Stream, s *service, p *progress, digest hash.Hash) error {
	if err := receive(stream, s.bytes, &p.received, digest, nil); err != nil {
		return err
	}
	return stream.ResetWithError(network.StreamErrorCode(s.code))
}

// silent reads, and never says a word, nor finishes.
func silent(stream network.Stream, s *service, p *progress, digest hash.Hash) error {
	if err := receive(stream, 0, &p.received, digest, nil); err != nil {
		return err
	}
	<-s.gate.open
	return nil
}
