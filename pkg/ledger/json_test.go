package ledger

import (
	"bytes"
	"encoding/json"
	"math"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

func TestFormatJSON(t *testing.T) {
	t.Parallel()
	r, _ := testRecord("01J")
	d := NewDraft(r, nil)
	got, err := FormatJSON(Entry{Index: math.MaxUint64, Record: r, Hash: d.hash, Link: [32]byte{0xab}, Raw: d.frame})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"index":18446744073709551615,"hash":"HASH","link":"ab00000000000000000000000000000000000000000000000000000000000000",` +
		`"record":{"version":1,"time":"2026-11-23T14:31:05.123456Z","event":"EVENT_ISSUE","outcome":"OUTCOME_SUCCESS",` +
		`"trust_domain":"example.org","spiffe_id":"spiffe://example.org/ns/shop/app/orders",` +
		`"certificate":{"serial":"SERIAL","sha256":"CERT","spki_sha256":"LEAF","key_algorithm":"EC-P256",` +
		`"not_before":"2026-11-23T14:31:05.123456Z","not_after":"2026-11-23T15:31:05.123456Z","dns_names":["orders.shop.internal"]},` +
		`"kind":"KIND_FIRST","instance":"docker:4f1c",` +
		`"workload":{"unix":{"uid":1000,"gid":1000,"path":"/usr/bin/orders"},` +
		`"docker":{"container_id":"4f1c5d2b8a","image":"registry.internal/shop/orders:1.4","labels":{"app":"orders","ns":"shop","team":"shop"}}},` +
		`"verified_by":"agent","node":{"id":"spiffe://example.org/meshid/node/x509pop/vm-7","address":"10.0.3.7:41234","agent_version":"0.1.0"},` +
		`"entry":{"name":"shop","revision":17,"digest":"LEAF"},"authority":{"id":"0a1b2c3d","role":"intermediate","state":"active"},` +
		`"ca_instance":"ca-2","request_id":"01J","took":"0.000412s"}}`
	leaf := sha([]byte("01J"))
	want = strings.NewReplacer(
		"HASH", hexOf(d.hash[:]), "SERIAL", hexOf(leaf[:16]), "CERT", hexOf(r.GetCertificate().GetSha256()), "LEAF", hexOf(leaf[:]),
	).Replace(want)
	if d := cmp.Diff(want, string(got)); d != "" {
		t.Error(d)
	}
	if !json.Valid(got) {
		t.Error("not JSON")
	}
}

func hexOf(b []byte) string {
	return strings.Trim(string(appendHex(nil, b)), `"`)
}

func TestFormatJSONValues(t *testing.T) {
	t.Parallel()
	rows := map[string]struct {
		record *ledgerv1.Record
		want   string
	}{
		"nothing":        {&ledgerv1.Record{}, `{}`},
		"hostile text":   {&ledgerv1.Record{Detail: "a\"b\\c\nd\te\x1b[2Jf\u009b2Jg\u202eh\u2028i\x7fj\U000e0001k<&>é漢😀"}, `{"detail":"a\"b\\c\nd\te\u001b[2Jf\u009b2Jg\u202eh\u2028i\u007fj\udb40\udc01k<&>é漢😀"}`},
		"unknown event":  {&ledgerv1.Record{Event: 999}, `{"event":999}`},
		"whole seconds":  {&ledgerv1.Record{Took: durationpb.New(3 * time.Second), Time: timestamppb.New(time.Unix(0, 0))}, `{"time":"1970-01-01T00:00:00Z","took":"3s"}`},
		"negative":       {&ledgerv1.Record{Took: durationpb.New(-1500 * time.Millisecond)}, `{"took":"-1.5s"}`},
		"negative below": {&ledgerv1.Record{Took: durationpb.New(-1)}, `{"took":"-0.000000001s"}`},
		"large integers": {
			&ledgerv1.Record{Entry: &ledgerv1.EntryRef{Revision: math.MaxUint64}, Workload: &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: -1, Groups: []int64{0, 4294967295}}}},
			`{"workload":{"unix":{"uid":-1,"groups":[0,4294967295]}},"entry":{"revision":18446744073709551615}}`,
		},
		"nested maps": {
			&ledgerv1.Record{Workload: &attributesv1.Workload{Ext: map[string]*attributesv1.Values{"b": {Values: map[string]string{"y": "1", "x": "2"}}, "a\x00": {}}}},
			`{"workload":{"ext":{"a\u0000":{},"b":{"values":{"x":"2","y":"1"}}}}}`,
		},
		"no time":   {&ledgerv1.Record{Time: &timestamppb.Timestamp{Seconds: 7, Nanos: -1}}, `{"time":{"seconds":7,"nanos":-1}}`},
		"no span":   {&ledgerv1.Record{Took: &durationpb.Duration{Seconds: math.MinInt64}}, `{"took":{"seconds":-9223372036854775808}}`},
		"far times": {&ledgerv1.Record{Time: timestamppb.New(time.Date(9999, 12, 31, 23, 59, 59, 999999999, time.UTC))}, `{"time":"9999-12-31T23:59:59.999999999Z"}`},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := FormatJSON(Entry{Record: row.record})
			if err != nil {
				t.Fatal(err)
			}
			_, record, _ := strings.Cut(string(got), `"record":`)
			if d := cmp.Diff(row.want, strings.TrimSuffix(record, "}")); d != "" {
				t.Error(d)
			}
			if !json.Valid(got) {
				t.Error("not JSON")
			}
		})
	}
}

// FuzzFormatJSON formats any record that can be decoded: what is in a ledger came
// from agents.
func FuzzFormatJSON(f *testing.F) {
	for _, r := range []*ledgerv1.Record{
		{},
		{Event: 999, Time: &timestamppb.Timestamp{Nanos: -1}, Took: &durationpb.Duration{Seconds: math.MaxInt64}},
		{Detail: "\x1b[2J\u202e\u2028\U000e0001", Workload: &attributesv1.Workload{Ext: map[string]*attributesv1.Values{"a": {Values: map[string]string{"b": "\""}}}}},
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	one, _ := testRecord("a")
	b, err := proto.Marshal(one)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var r ledgerv1.Record
		if proto.Unmarshal(b, &r) != nil {
			return
		}
		got, err := FormatJSON(Entry{Record: &r})
		if err != nil || !json.Valid(got) {
			t.Fatalf("%q, %v", got, err)
		}
		for _, c := range string(got) {
			if !strconv.IsPrint(c) {
				t.Fatalf("%q in %q", c, got)
			}
		}
		again, err := FormatJSON(Entry{Record: proto.CloneOf(&r)})
		if err != nil || !bytes.Equal(got, again) {
			t.Fatalf("%q, then %q", got, again)
		}
	})
}
