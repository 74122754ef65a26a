// Package cef expresses records of the ledger in the Common Event Format that
// SIEMs read. It answers "which of the format's fields is this". It does not know
// how lines travel.
//
// The header has nothing in it that anybody but the CA chose, and no character that
// would have to be escaped, since some readers know of none there. In the extension,
// values are escaped as the format says (ArcSight CEF, revision 25, "Character
// Encoding"), and further characters that do not print are written as \uXXXX: no
// value can end its field, its event or its line.
package cef

import (
	"encoding/hex"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// clip is the length of the longest value, which the format gives for its fields
// of text such as msg.
const clip = 1023

// severities of outcomes: 0 to 10.
var severities = map[ledgerv1.Outcome]string{
	ledgerv1.Outcome_OUTCOME_SUCCESS: "3",
	ledgerv1.Outcome_OUTCOME_REFUSED: "6",
	ledgerv1.Outcome_OUTCOME_ERROR:   "8",
}

// Format returns e as one CEF event. It is an export.Format.
func Format(e ledger.Entry) ([]byte, error) {
	r := e.Record
	severity := severities[r.GetOutcome()]
	if severity == "" {
		severity = "5"
	}
	b := []byte("CEF:0")
	for _, field := range []string{"meshid", "ca", r.GetCaVersion(), ledger.EventName(r.GetEvent()), export.Title(r), severity} {
		b = append(append(b, '|'), header(field)...)
	}
	b = append(b, '|')

	x := extension{b: b}
	x.time("rt", r.GetTime())
	x.add("externalId", strconv.FormatUint(e.Index, 10))
	x.add("act", ledger.EventName(r.GetEvent()))
	x.add("outcome", ledger.OutcomeName(r.GetOutcome()))
	x.add("reason", r.GetReason())
	x.add("msg", r.GetDetail())
	x.add("cat", export.KindName(r.GetKind()))
	x.add("suser", r.GetActor())
	x.add("shost", r.GetNode().GetId())
	x.address(r.GetNode().GetAddress())
	x.add("dvchost", r.GetCaInstance())
	x.add("duser", r.GetSpiffeId())
	x.time("start", r.GetCertificate().GetNotBefore())
	x.time("end", r.GetCertificate().GetNotAfter())
	x.labelled("cs1", "serial", hex.EncodeToString(r.GetCertificate().GetSerial()))
	x.labelled("cs2", "certificateSha256", hex.EncodeToString(r.GetCertificate().GetSha256()))
	x.labelled("cs3", "entry", r.GetEntry().GetName())
	x.labelled("cs4", "instance", r.GetInstance())
	x.labelled("cs5", "recordHash", hex.EncodeToString(e.Hash[:]))
	x.labelled("cs6", "requestId", r.GetRequestId())
	if r.GetEntry() != nil {
		x.labelled("cn1", "entryRevision", strconv.FormatUint(r.GetEntry().GetRevision(), 10))
	}
	if t := r.GetTook(); t != nil {
		x.labelled("cn2", "tookMicroseconds", strconv.FormatInt(t.AsDuration().Microseconds(), 10))
	}
	if s := r.GetSummary(); s != nil {
		x.add("cnt", strconv.FormatUint(s.GetCount(), 10))
	}
	return x.b, nil
}

// extension is an event that grows.
type extension struct {
	b    []byte
	more bool
}

// add adds a field, unless its value is empty.
func (x *extension) add(key, value string) {
	if value == "" {
		return
	}
	if x.more {
		x.b = append(x.b, ' ')
	}
	x.more = true
	x.b = append(append(x.b, key...), '=')
	x.b = export.AppendVisible(x.b, export.Clip(value, clip), text)
}

// labelled adds a field whose meaning another field says.
func (x *extension) labelled(key, label, value string) {
	if value != "" {
		x.add(key+"Label", label)
		x.add(key, value)
	}
}

// time adds a time in milliseconds since 1970.
func (x *extension) time(key string, t *timestamppb.Timestamp) {
	if t != nil {
		x.add(key, strconv.FormatInt(t.AsTime().UnixMilli(), 10))
	}
}

// address adds where a node calls from.
func (x *extension) address(s string) {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return
	}
	if ip := a.Addr().Unmap(); ip.Is4() {
		x.add("src", ip.String())
	} else {
		x.labelled("c6a2", "sourceIPv6", ip.WithZone("").String())
	}
	x.add("spt", strconv.Itoa(int(a.Port())))
}

// header is s as a field of the header; some readers refuse an empty one.
func header(s string) string {
	if s == "" {
		return "unknown"
	}
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || strings.ContainsRune(`|\=`, r) {
			return '_'
		}
		return r
	}, s)
	return s[:min(len(s), clip)]
}

// text adds a character to a value of the extension.
func text(b []byte, r rune) []byte {
	if r == '=' || r == '\\' {
		b = append(b, '\\')
	}
	return utf8.AppendRune(b, r)
}
