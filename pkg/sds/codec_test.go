package sds

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// The node is left out of requests, wherever it stands in them and however they are
// split, and all else stays.
func TestWithout(t *testing.T) {
	field := func(n protowire.Number, v string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, n, protowire.BytesType), v)
	}
	var other []byte // what a later version of the API may have
	other = protowire.AppendVarint(protowire.AppendTag(other, 100, protowire.VarintType), 1<<40)
	other = protowire.AppendFixed32(protowire.AppendTag(other, 101, protowire.Fixed32Type), 7)
	other = protowire.AppendFixed64(protowire.AppendTag(other, 102, protowire.Fixed64Type), 8)
	before, node, after := field(1, "version"), field(2, strings.Repeat("n", 700)), field(3, "name")
	want := slices.Concat(before, other, after)
	for _, whole := range [][]byte{
		slices.Concat(before, node, other, after), slices.Concat(node, before, other, after),
		slices.Concat(before, other, after, node), slices.Concat(before, other, after), slices.Concat(before, node, node, other, node, after),
	} {
		for size := 1; size < len(whole)+1; size = size*3 + 1 {
			got, err := without(split(whole, size), 2)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("in parts of %d bytes: %x, %v", size, got, err)
			}
		}
		// Nothing that was cut off is taken for a request, unless it is one.
		for n := range whole {
			got, err := without(split(whole[:n], 64), 2)
			if err == nil && !complete(got) {
				t.Errorf("of %d bytes: %x", n, got)
			}
		}
	}
	for name, bad := range map[string][]byte{
		"a group":     protowire.AppendTag(nil, 9, protowire.StartGroupType),
		"half a tag":  {0x80},
		"beyond":      protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.BytesType), 1<<62),
		"no length":   protowire.AppendTag(nil, 2, protowire.BytesType),
		"half fixed":  append(protowire.AppendTag(nil, 2, protowire.Fixed32Type), 1, 2),
		"long varint": append(protowire.AppendTag(nil, 3, protowire.VarintType), bytes.Repeat([]byte{0xff}, 11)...),
	} {
		if got, err := without(split(bad, 1), 2); err == nil {
			t.Errorf("%s is taken for %x", name, got)
		}
	}
}

// split returns data as it comes in frames.
func split(data []byte, size int) (all mem.BufferSlice) {
	for part := range slices.Chunk(data, size) {
		all = append(all, mem.SliceBuffer(part))
	}
	return all
}

// complete says whether data are fields from the beginning to the end.
func complete(data []byte) bool {
	for len(data) > 0 {
		_, _, n := protowire.ConsumeField(data)
		if n < 0 {
			return false
		}
		data = data[n:]
	}
	return true
}
