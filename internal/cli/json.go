package cli

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// JSON writes v, indented. A protobuf message has its field names as they are
// in the .proto file, numbers as numbers, and bytes as lower-case hexadecimal,
// as serials and fingerprints are written everywhere else.
func JSON(w io.Writer, v any) error {
	var data []byte
	var err error
	if m, ok := v.(proto.Message); ok {
		data, err = MarshalJSON(m)
	} else {
		data, err = json.Marshal(v)
	}
	if err != nil {
		return err
	}
	var indented bytes.Buffer
	if err := json.Indent(&indented, data, "", "  "); err != nil {
		return err
	}
	indented.WriteByte('\n')
	_, err = w.Write(indented.Bytes())
	return err
}

// MarshalJSON renders a message as JSON does, on one line.
func MarshalJSON(m proto.Message) ([]byte, error) { return marshal(m, true) }

// MarshalSet is MarshalJSON without the fields that are not set.
func MarshalSet(m proto.Message) ([]byte, error) { return marshal(m, false) }

func marshal(m proto.Message, unset bool) ([]byte, error) {
	data, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: unset}.Marshal(m)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var tree any
	if err := d.Decode(&tree); err != nil {
		return nil, err
	}
	readable(m.ProtoReflect().Descriptor(), tree)
	return json.Marshal(tree)
}

// readable rewrites the fields of a message in its JSON tree: bytes to
// hexadecimal, and 64-bit integers, which are strings in protobuf's JSON, to
// numbers.
func readable(d protoreflect.MessageDescriptor, tree any) {
	object, ok := tree.(map[string]any)
	if !ok {
		return
	}
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		v, present := object[string(f.Name())]
		if !present || v == nil {
			continue
		}
		switch {
		case f.IsMap():
			if m, ok := v.(map[string]any); ok && f.MapValue().Message() != nil {
				for _, e := range m {
					readable(f.MapValue().Message(), e)
				}
			}
		case f.Kind() == protoreflect.BytesKind:
			object[string(f.Name())] = each(v, func(s string) any {
				raw, err := base64.StdEncoding.DecodeString(s)
				if err != nil {
					return s
				}
				return hex.EncodeToString(raw)
			})
		case f.Kind() == protoreflect.Int64Kind || f.Kind() == protoreflect.Uint64Kind:
			object[string(f.Name())] = each(v, func(s string) any { return json.Number(s) })
		case f.IsList() && f.Message() != nil:
			if l, ok := v.([]any); ok {
				for _, e := range l {
					readable(f.Message(), e)
				}
			}
		case f.Message() != nil:
			readable(f.Message(), v)
		}
	}
}

// each replaces a string, or those of a list.
func each(v any, replace func(string) any) any {
	switch v := v.(type) {
	case string:
		return replace(v)
	case []any:
		for i := range v {
			v[i] = each(v[i], replace)
		}
	}
	return v
}
