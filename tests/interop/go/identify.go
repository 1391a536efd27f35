package main

import (
	"bufio"
	"context"
	"fmt"
	"io"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/record"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	"github.com/multiformats/go-multiaddr"
	"github.com/multiformats/go-varint"
	"google.golang.org/protobuf/proto"
)

// identify asks the peer on a stream of its own, so that all that it says is seen, not what the host made of it.
func (n *node) identify(ctx context.Context, id peer.ID) (answer, error) {
	stream, err := n.open(ctx, id, identify.ID)
	if err != nil {
		return nil, err
	}
	defer func() { _ = stream.Reset() }()
	deadline, _ := ctx.Deadline()
	_ = stream.SetDeadline(deadline)
	message := &pb.Identify{}
	reader := bufio.NewReader(io.LimitReader(stream, 64*1024))
	parts := 0
	for { // the message may come in several parts that are to be merged
		if _, err := reader.Peek(1); err == io.EOF {
			break
		}
		length, err := varint.ReadUvarint(reader)
		if err != nil {
			return nil, err
		}
		content := make([]byte, length)
		if _, err = io.ReadFull(reader, content); err != nil {
			return nil, err
		}
		if err = (proto.UnmarshalOptions{Merge: true}).Unmarshal(content, message); err != nil {
			return nil, err
		}
		parts++
	}
	result := answer{
		"parts":            parts,
		"agent":            message.GetAgentVersion(),
		"protocol_version": message.GetProtocolVersion(),
		"protocols":        message.GetProtocols(),
		"observed":         text(message.GetObservedAddr()),
		"addresses":        texts(message.GetListenAddrs()),
		"record":           "absent",
	}
	if message.GetSignedPeerRecord() != nil {
		result["record"], err = checkRecord(message.GetSignedPeerRecord(), id, result)
	}
	return result, err
}

func checkRecord(content []byte, from peer.ID, into answer) (string, error) {
	envelope, untyped, err := record.ConsumeEnvelope(content, peer.PeerRecordEnvelopeDomain)
	if err != nil {
		return "invalid", err
	}
	said, ok := untyped.(*peer.PeerRecord)
	if !ok || said.PeerID != from || !from.MatchesPublicKey(envelope.PublicKey) {
		return "invalid", fmt.Errorf("the signed record is not about %s", from)
	}
	addresses := []string{}
	for _, address := range said.Addrs {
		addresses = append(addresses, address.String())
	}
	into["record_addresses"], into["record_seq"] = addresses, said.Seq
	return "verified", nil
}

func text(address []byte) string {
	parsed, err := multiaddr.NewMultiaddrBytes(address)
	if err != nil {
		return ""
	}
	return parsed.String()
}

func texts(addresses [][]byte) []string {
	result := []string{}
	for _, address := range addresses {
		result = append(result, text(address))
	}
	return result
}
