package sds

import (
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that is wrapped
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// codec is gRPC's own one, but for one thing: a proxy's description of itself is
// cut out of discovery requests before they are decoded. It has 516 extensions,
// a hundred times the size of the rest, and nothing in it may be believed.
type codec struct {
	encoding.CodecV2
}

func newCodec() codec { return codec{encoding.GetCodecV2("proto")} }

// Fields of the requests in envoy/service/discovery/v3/discovery.proto.
const (
	nodeOfRequest      protowire.Number = 2
	nodeOfDeltaRequest protowire.Number = 1
)

// Unmarshal decodes data into v, without the node if v is a discovery request.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	switch v := v.(type) {
	case *incoming:
		return v.decode(data)
	case *discoveryv3.DiscoveryRequest:
		return decode(data, nodeOfRequest, v)
	case *discoveryv3.DeltaDiscoveryRequest:
		return decode(data, nodeOfDeltaRequest, v)
	default:
		return c.CodecV2.Unmarshal(data, v)
	}
}

// incoming is a request that is waited for, mostly for as long as the stream is
// open: the message that it comes in exists only while it is decoded.
type incoming struct {
	delta    bool
	received *received
}

func (i *incoming) decode(data mem.BufferSlice) error {
	r := &received{}
	if i.delta {
		m := &discoveryv3.DeltaDiscoveryRequest{}
		if err := decode(data, nodeOfDeltaRequest, m); err != nil {
			return err
		}
		r.typeURL = m.GetTypeUrl()
		r.nonce, r.subscribe, r.unsubscribe = m.GetResponseNonce(), m.GetResourceNamesSubscribe(), m.GetResourceNamesUnsubscribe()
		r.initial = m.GetInitialResourceVersions()
		r.refuse, r.problem = m.GetErrorDetail() != nil, m.GetErrorDetail().GetMessage()
	} else {
		m := &discoveryv3.DiscoveryRequest{}
		if err := decode(data, nodeOfRequest, m); err != nil {
			return err
		}
		r.typeURL = m.GetTypeUrl()
		r.nonce, r.names, r.version = m.GetResponseNonce(), m.GetResourceNames(), m.GetVersionInfo()
		r.refuse, r.problem = m.GetErrorDetail() != nil, m.GetErrorDetail().GetMessage()
	}
	i.received = r
	return nil
}

// decode decodes data into m, without one field.
func decode(data mem.BufferSlice, node protowire.Number, m proto.Message) error {
	rest, err := without(data, node)
	if err != nil {
		return err
	}
	return proto.Unmarshal(rest, m)
}

// without returns the fields of an encoded message but those with one number, which
// are passed over where they lie: the node of a request is sixteen times as large as
// anything else here. The result does not share memory with data.
func without(data mem.BufferSlice, number protowire.Number) ([]byte, error) {
	r := data.Reader()
	defer r.Close() //nolint:errcheck // it cannot fail
	var kept []byte
	var room [2 * binary.MaxVarintLen64]byte
	for r.Remaining() > 0 {
		tag, err := binary.ReadUvarint(r)
		if err != nil {
			return nil, fmt.Errorf("decode request: %w", err)
		}
		field, kind := protowire.DecodeTag(tag)
		head, size := binary.AppendUvarint(room[:0], tag), uint64(0)
		switch kind {
		case protowire.VarintType:
			var v uint64
			v, err = binary.ReadUvarint(r)
			head = binary.AppendUvarint(head, v)
		case protowire.Fixed32Type:
			size = 4
		case protowire.Fixed64Type:
			size = 8
		case protowire.BytesType:
			size, err = binary.ReadUvarint(r)
			head = binary.AppendUvarint(head, size)
		default: // proto3 has no groups
			err = fmt.Errorf("field %d has wire type %d", field, kind)
		}
		if err == nil && size > uint64(r.Remaining()) { //nolint:gosec // not negative
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, fmt.Errorf("decode request: %w", err)
		}
		n := int(size)
		if field == number {
			_, err = r.Discard(n)
		} else {
			kept = slices.Grow(append(kept, head...), n)
			kept = kept[:len(kept)+n]
			_, err = io.ReadFull(r, kept[len(kept)-n:])
		}
		if err != nil {
			return nil, fmt.Errorf("decode request: %w", err)
		}
	}
	return kept, nil
}
