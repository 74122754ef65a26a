package ledger

import (
	"encoding/hex"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// FormatJSON returns e as one JSON object on one line, without a line feed:
//
//	{"index":7,"hash":"<64 hex digits>","link":"<64 hex digits>","record":{…}}
//
// The link is left out if it is not known, as of a record that was read from a proof.
// The record is a protobuf message in JSON with the field names of its .proto
// file, fields that are not set left out, and these rules where the protobuf
// mapping leaves a choice or is unkind to people and tools: bytes (serials,
// hashes) are lower-case hexadecimal; integers are numbers, also those of 64 bits;
// times are RFC 3339 in UTC; durations are seconds with the suffix "s"; enum
// values are their names; maps are sorted by key, fields by number. What a
// terminal could take for a command, or a reader for something else, is escaped
// in strings. A time or duration that is out of range is an object of its seconds
// and nanos: no record that is in a ledger keeps those behind it from being read. The same entry always gives the same bytes.
func FormatJSON(e Entry) ([]byte, error) {
	b := make([]byte, 0, 2*len(e.Raw)+256)
	b = append(b, `{"index":`...)
	b = strconv.AppendUint(b, e.Index, 10)
	b = append(b, `,"hash":`...)
	b = appendHex(b, e.Hash[:])
	if e.Link != ([32]byte{}) {
		b = append(b, `,"link":`...)
		b = appendHex(b, e.Link[:])
	}
	b = append(b, `,"record":`...)
	b, err := appendMessage(b, e.Record.ProtoReflect())
	if err != nil {
		return nil, fmt.Errorf("format ledger record %d: %w", e.Index, err)
	}
	return append(b, '}'), nil
}

// appendMessage adds m as a JSON value.
func appendMessage(b []byte, m protoreflect.Message) ([]byte, error) {
	switch v := m.Interface().(type) {
	case *timestamppb.Timestamp:
		if v.CheckValid() == nil {
			b = append(b, '"')
			b = v.AsTime().AppendFormat(b, time.RFC3339Nano)
			return append(b, '"'), nil
		}
	case *durationpb.Duration:
		if v.CheckValid() == nil {
			return appendDuration(b, v), nil
		}
	}
	fields := m.Descriptor().Fields()
	byNumber := make([]protoreflect.FieldDescriptor, 0, fields.Len())
	for i := range fields.Len() {
		if f := fields.Get(i); m.Has(f) {
			byNumber = append(byNumber, f)
		}
	}
	slices.SortFunc(byNumber, func(x, y protoreflect.FieldDescriptor) int { return int(x.Number()) - int(y.Number()) })
	b = append(b, '{')
	for i, f := range byNumber {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(b, string(f.Name()))
		b = append(b, ':')
		var err error
		if b, err = appendField(b, f, m.Get(f)); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
	}
	return append(b, '}'), nil
}

// appendField adds the value of a field, which may be a list or a map.
func appendField(b []byte, f protoreflect.FieldDescriptor, v protoreflect.Value) (_ []byte, err error) {
	switch {
	case f.IsMap():
		type pair struct {
			key   string
			value protoreflect.Value
		}
		var pairs []pair
		v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			pairs = append(pairs, pair{k.String(), v})
			return true
		})
		slices.SortFunc(pairs, func(x, y pair) int { return strings.Compare(x.key, y.key) })
		b = append(b, '{')
		for i, p := range pairs {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(appendString(b, p.key), ':')
			if b, err = appendValue(b, f.MapValue(), p.value); err != nil {
				return nil, err
			}
		}
		return append(b, '}'), nil
	case f.IsList():
		b = append(b, '[')
		for i := range v.List().Len() {
			if i > 0 {
				b = append(b, ',')
			}
			if b, err = appendValue(b, f, v.List().Get(i)); err != nil {
				return nil, err
			}
		}
		return append(b, ']'), nil
	default:
		return appendValue(b, f, v)
	}
}

// appendValue adds one value of f's kind.
func appendValue(b []byte, f protoreflect.FieldDescriptor, v protoreflect.Value) ([]byte, error) {
	switch f.Kind() {
	case protoreflect.MessageKind, protoreflect.GroupKind:
		return appendMessage(b, v.Message())
	case protoreflect.EnumKind:
		if d := f.Enum().Values().ByNumber(v.Enum()); d != nil {
			return appendString(b, string(d.Name())), nil
		}
		return strconv.AppendInt(b, int64(v.Enum()), 10), nil // of a newer version
	case protoreflect.BytesKind:
		return appendHex(b, v.Bytes()), nil
	case protoreflect.StringKind:
		return appendString(b, v.String()), nil
	case protoreflect.BoolKind:
		return strconv.AppendBool(b, v.Bool()), nil
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind, protoreflect.Fixed32Kind, protoreflect.Fixed64Kind:
		return strconv.AppendUint(b, v.Uint(), 10), nil
	case protoreflect.FloatKind, protoreflect.DoubleKind:
		if x := v.Float(); math.IsNaN(x) || math.IsInf(x, 0) {
			return appendString(b, strconv.FormatFloat(x, 'g', -1, 64)), nil
		}
		return strconv.AppendFloat(b, v.Float(), 'g', -1, 64), nil
	default: // the signed integers
		return strconv.AppendInt(b, v.Int(), 10), nil
	}
}

// appendDuration adds d exactly, as seconds.
func appendDuration(b []byte, d *durationpb.Duration) []byte {
	seconds, nanos := d.GetSeconds(), d.GetNanos()
	b = append(b, '"')
	if seconds < 0 || nanos < 0 {
		b = append(b, '-')
		seconds, nanos = -seconds, -nanos
	}
	b = strconv.AppendInt(b, seconds, 10)
	if nanos != 0 {
		b = append(b, '.')
		b = append(b, strings.TrimRight(fmt.Sprintf("%09d", nanos), "0")...)
	}
	return append(b, 's', '"')
}

// appendHex adds v as a string.
func appendHex(b, v []byte) []byte {
	b = append(b, '"')
	b = hex.AppendEncode(b, v)
	return append(b, '"')
}

// appendString adds s, with everything escaped that does not print: control
// characters, and those that change the direction of text.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r == '\n':
			b = append(b, '\\', 'n')
		case r == '\t':
			b = append(b, '\\', 't')
		case strconv.IsPrint(r):
			b = utf8.AppendRune(b, r)
		case r > 0xffff:
			high, low := 0xd800+(r-0x10000)>>10, 0xdc00+(r-0x10000)&0x3ff
			b = fmt.Appendf(b, `\u%04x\u%04x`, high, low)
		default:
			b = fmt.Appendf(b, `\u%04x`, r)
		}
	}
	return append(b, '"')
}

// EventName is how an event is called outside of protobuf, such as "issue"; one of
// a newer version is its number.
func EventName(e ledgerv1.Event) string {
	return strings.ToLower(strings.TrimPrefix(e.String(), "EVENT_"))
}

// OutcomeName is "success", "refused" or "error".
func OutcomeName(o ledgerv1.Outcome) string {
	return strings.ToLower(strings.TrimPrefix(o.String(), "OUTCOME_"))
}
