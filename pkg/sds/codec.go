package sds

import (
	"fmt"

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
	var node protowire.Number
	switch v.(type) {
	case *discoveryv3.DiscoveryRequest:
		node = nodeOfRequest
	case *discoveryv3.DeltaDiscoveryRequest:
		node = nodeOfDeltaRequest
	default:
		return c.CodecV2.Unmarshal(data, v)
	}
	m, ok := v.(proto.Message)
	if !ok {
		return fmt.Errorf("decode %T: not a message", v)
	}
	b := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer b.Free()
	rest, err := without(b.ReadOnlyData(), node)
	if err != nil {
		return err
	}
	return proto.Unmarshal(rest, m)
}

// without returns the fields of an encoded message but those with one number.
// The result does not share memory with data.
func without(data []byte, number protowire.Number) ([]byte, error) {
	var kept []byte
	for len(data) > 0 {
		num, _, n := protowire.ConsumeField(data)
		if n < 0 {
			return nil, fmt.Errorf("decode request: %w", protowire.ParseError(n))
		}
		if num != number {
			kept = append(kept, data[:n]...)
		}
		data = data[n:]
	}
	return kept, nil
}
