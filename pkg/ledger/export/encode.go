package export

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Format expresses a record on one line, without a line feed. Whatever a record
// holds, a parser of the format finds one event in the line.
type Format func(ledger.Entry) ([]byte, error)

// Formats are the formats that there are, by name.
type Formats map[string]Format

// Get returns the format with the name; an error is a *SettingError.
func (f Formats) Get(name string, allowed ...string) (Format, error) {
	for _, a := range allowed {
		if a == name && f[a] != nil {
			return f[a], nil
		}
	}
	return nil, Bad("format", "%q is none of %s", name, strings.Join(allowed, ", "))
}

const (
	// MinRecordBytes is the least that a limit of Encode may be.
	MinRecordBytes = 4096

	clipName = 256 // bytes of a name in an abridged record
	clipText = 512 // bytes of a text in an abridged record
)

// Encode expresses e in at most limit bytes, which must be MinRecordBytes or more.
// If there is more to say, it is said of an abridged record, which lacks what may
// be long and says so in its detail: what a receiver would cut in two must never
// be sent. The ledger has all of it, under the same index.
func Encode(f Format, e ledger.Entry, limit int) (line []byte, abridged bool) {
	line, err := f(e)
	if err == nil && len(line) <= limit {
		return line, false
	}
	why := fmt.Sprintf("abridged from %d bytes", len(e.Raw))
	if err != nil {
		why = "abridged, since it cannot be expressed"
	}
	for _, r := range []*ledgerv1.Record{abridge(e.Record, why), least(e.Record, why)} {
		line, err = f(ledger.Entry{Index: e.Index, Hash: e.Hash, Link: e.Link, Record: r})
		if err == nil && len(line) <= limit {
			return line, true
		}
	}
	return fmt.Appendf(nil, `{"index":%d}`, e.Index), true // no format does this
}

// abridge keeps what is short.
func abridge(r *ledgerv1.Record, why string) *ledgerv1.Record {
	a := least(r, why)
	if d := r.GetDetail(); d != "" {
		a.Detail += ": " + Clip(d, clipText)
	}
	a.Reason = Clip(r.GetReason(), clipName)
	a.TrustDomain, a.SpiffeId = Clip(r.GetTrustDomain(), clipName), Clip(r.GetSpiffeId(), clipText)
	if c := r.GetCertificate(); c != nil {
		a.Certificate = &ledgerv1.Certificate{
			Serial: clipBytes(c.GetSerial()), Sha256: clipBytes(c.GetSha256()), SpkiSha256: clipBytes(c.GetSpkiSha256()),
			KeyAlgorithm: Clip(c.GetKeyAlgorithm(), clipName), NotBefore: valid(c.GetNotBefore()), NotAfter: valid(c.GetNotAfter()),
		}
	}
	a.Kind, a.PreviousSerial = r.GetKind(), clipBytes(r.GetPreviousSerial())
	a.Instance, a.VerifiedBy = Clip(r.GetInstance(), clipName), Clip(r.GetVerifiedBy(), clipName)
	if n := r.GetNode(); n != nil {
		a.Node = &ledgerv1.NodeRef{Id: Clip(n.GetId(), clipText), Address: Clip(n.GetAddress(), clipName), AgentVersion: Clip(n.GetAgentVersion(), clipName)}
	}
	if x := r.GetEntry(); x != nil {
		a.Entry = &ledgerv1.EntryRef{Name: Clip(x.GetName(), clipName), Revision: x.GetRevision(), Digest: clipBytes(x.GetDigest())}
	}
	if x := r.GetAuthority(); x != nil {
		a.Authority = &ledgerv1.Authority{Id: Clip(x.GetId(), clipName), Role: Clip(x.GetRole(), clipName), State: Clip(x.GetState(), clipName), Tainted: x.GetTainted()}
	}
	a.Actor, a.CaInstance = Clip(r.GetActor(), clipName), Clip(r.GetCaInstance(), clipName)
	a.RequestId, a.CaVersion = Clip(r.GetRequestId(), clipName), Clip(r.GetCaVersion(), clipName)
	a.TokenSha256, a.Call = clipBytes(r.GetTokenSha256()), Clip(r.GetCall(), clipName)
	if d := r.GetTook(); d != nil && d.CheckValid() == nil {
		a.Took = &durationpb.Duration{Seconds: d.GetSeconds(), Nanos: d.GetNanos()}
	}
	if x := r.GetArchive(); x != nil {
		a.Archive = &ledgerv1.Archive{First: x.GetFirst(), End: x.GetEnd(), Link: clipBytes(x.GetLink()), Folder: Clip(x.GetFolder(), clipText), Before: valid(x.GetBefore())}
	}
	if x := r.GetSignIn(); x != nil {
		a.SignIn = &ledgerv1.SignIn{Method: Clip(x.GetMethod(), clipName), Address: Clip(x.GetAddress(), clipName), CertificateSha256: clipBytes(x.GetCertificateSha256())}
	}
	if s := r.GetSummary(); s != nil {
		a.Summary = &ledgerv1.Summary{Count: s.GetCount(), Since: valid(s.GetSince())}
	}
	return a
}

// least keeps what cannot be long.
func least(r *ledgerv1.Record, why string) *ledgerv1.Record {
	return &ledgerv1.Record{Version: r.GetVersion(), Time: valid(r.GetTime()), Event: r.GetEvent(), Outcome: r.GetOutcome(), Detail: why}
}

// valid returns t if it can be expressed.
func valid(t *timestamppb.Timestamp) *timestamppb.Timestamp {
	if t == nil || t.CheckValid() != nil {
		return nil
	}
	return &timestamppb.Timestamp{Seconds: t.GetSeconds(), Nanos: t.GetNanos()}
}

// clipBytes returns the first bytes of what is a hash or a serial.
func clipBytes(b []byte) []byte { return b[:min(len(b), 64)] }

// Clip returns the beginning of s in at most limit bytes, with an ellipsis if it
// is not all of it.
func Clip(s string, limit int) string {
	const ellipsis = "…"
	if len(s) <= limit {
		return s
	}
	end := limit - len(ellipsis)
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + ellipsis
}

// AppendVisible adds s with each character that does not print as \uXXXX (and
// \uXXXXXXXX above U+FFFF): control characters, separators of lines, and those
// that change the direction of text. What write adds the others with is up to the
// format.
func AppendVisible(b []byte, s string, write func(b []byte, r rune) []byte) []byte {
	for _, r := range s {
		switch {
		case strconv.IsPrint(r):
			b = write(b, r)
		case r > 0xffff:
			b = fmt.Appendf(write(b, '\\'), "u%08x", r)
		default:
			b = fmt.Appendf(write(b, '\\'), "u%04x", r)
		}
	}
	return b
}

// KindName is "first", "renewal" or "rotation", or empty if there is none.
func KindName(k ledgerv1.Kind) string {
	if k == ledgerv1.Kind_KIND_UNSPECIFIED {
		return ""
	}
	return enumName(k, int32(k))
}

// enumName is the short name of a value, or its number if it is of a newer version.
func enumName(e protoreflect.Enum, n int32) string {
	if v := e.Descriptor().Values().ByNumber(e.Number()); v != nil {
		return short(e.Descriptor(), v)
	}
	return strconv.Itoa(int(n))
}

// titles name events for people.
var titles = map[ledgerv1.Event]string{
	ledgerv1.Event_EVENT_ISSUE:           "Issue X.509-SVID",
	ledgerv1.Event_EVENT_ATTEST:          "Attest node",
	ledgerv1.Event_EVENT_RENEW_AGENT:     "Renew agent",
	ledgerv1.Event_EVENT_EVICT:           "Evict node",
	ledgerv1.Event_EVENT_BAN:             "Ban node",
	ledgerv1.Event_EVENT_UNBAN:           "Lift ban of node",
	ledgerv1.Event_EVENT_ENTRY_APPLIED:   "Apply entry",
	ledgerv1.Event_EVENT_ENTRY_DELETED:   "Delete entry",
	ledgerv1.Event_EVENT_ENTRY_LOADED:    "Load entry",
	ledgerv1.Event_EVENT_TOKEN_CREATED:   "Create join token",
	ledgerv1.Event_EVENT_TOKEN_USED:      "Use join token",
	ledgerv1.Event_EVENT_TOKEN_DELETED:   "Delete join token",
	ledgerv1.Event_EVENT_AUTHORITY:       "Change authority",
	ledgerv1.Event_EVENT_BUNDLE:          "Change trust bundle",
	ledgerv1.Event_EVENT_INSTANCE_ENDED:  "End workload instance",
	ledgerv1.Event_EVENT_STARTED:         "Start CA",
	ledgerv1.Event_EVENT_STOPPED:         "Stop CA",
	ledgerv1.Event_EVENT_CLOCK:           "Judge clock",
	ledgerv1.Event_EVENT_CALL_REFUSED:    "Refuse admin call",
	ledgerv1.Event_EVENT_QUARANTINE:      "Change quarantine",
	ledgerv1.Event_EVENT_RENEWAL_ORDERED: "Order renewal",
	ledgerv1.Event_EVENT_ARCHIVED:        "Archive ledger",
	ledgerv1.Event_EVENT_SIGN_IN:         "Sign in to console",
	ledgerv1.Event_EVENT_STORE_ACCEPTED:  "Accept database",
	ledgerv1.Event_EVENT_STORE_EDITED:    "Disbelieve database",
	ledgerv1.Event_EVENT_WITHDRAWN:       "Complete withdrawal",
	ledgerv1.Event_EVENT_REVOKED:         "Revoke certificate",
	ledgerv1.Event_EVENT_APPROVAL:        "Agree on change of roots",
}

// Title names what a record is about for people; it holds nothing of the record's.
func Title(r *ledgerv1.Record) string {
	title := titles[r.GetEvent()]
	if title == "" {
		title = "Event " + ledger.EventName(r.GetEvent())
	}
	return title + ": " + ledger.OutcomeName(r.GetOutcome())
}
