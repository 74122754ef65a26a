// Package ocsf expresses records of the ledger as events of the Open Cybersecurity
// Schema Framework, version 1.6.0. It answers "which class of event is this, and
// which of its attributes". It does not know how events travel.
//
// The complete record is in the attribute unmapped, in the ledger's own JSON.
package ocsf

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Version is the version of the schema.
const Version = "1.6.0"

// Classes of events.
const (
	baseEvent            = 0
	entityManagement     = 3004
	authentication       = 3002
	applicationLifecycle = 6002
	apiActivity          = 6003
)

// Activities; the numbers mean the same in all classes that are used here, but
// those of authentication and application life cycles.
const (
	other     = 99
	create    = 1
	update    = 3
	remove    = 4
	unenroll  = 7
	enable    = 8
	disable   = 9
	activate  = 10
	deactive  = 11
	logon     = 1
	startApp  = 3
	stopApp   = 4
	openID    = 4 // auth_protocol_id
	successID = 1
	failureID = 2
)

// object is a JSON object.
type object = map[string]any

// kinds say what events are; an event that is not here is a base event.
var kinds = map[ledgerv1.Event]struct{ class, activity int }{
	ledgerv1.Event_EVENT_ISSUE:           {entityManagement, create}, // or update
	ledgerv1.Event_EVENT_ATTEST:          {authentication, logon},
	ledgerv1.Event_EVENT_RENEW_AGENT:     {entityManagement, update},
	ledgerv1.Event_EVENT_EVICT:           {entityManagement, unenroll},
	ledgerv1.Event_EVENT_BAN:             {entityManagement, disable},
	ledgerv1.Event_EVENT_UNBAN:           {entityManagement, enable},
	ledgerv1.Event_EVENT_ENTRY_APPLIED:   {apiActivity, update},
	ledgerv1.Event_EVENT_ENTRY_DELETED:   {apiActivity, remove},
	ledgerv1.Event_EVENT_ENTRY_LOADED:    {entityManagement, activate},
	ledgerv1.Event_EVENT_TOKEN_CREATED:   {apiActivity, create},
	ledgerv1.Event_EVENT_TOKEN_USED:      {authentication, logon},
	ledgerv1.Event_EVENT_TOKEN_DELETED:   {apiActivity, remove},
	ledgerv1.Event_EVENT_AUTHORITY:       {entityManagement, update}, // or as its state says
	ledgerv1.Event_EVENT_BUNDLE:          {entityManagement, update},
	ledgerv1.Event_EVENT_INSTANCE_ENDED:  {entityManagement, remove},
	ledgerv1.Event_EVENT_STARTED:         {applicationLifecycle, startApp},
	ledgerv1.Event_EVENT_STOPPED:         {applicationLifecycle, stopApp},
	ledgerv1.Event_EVENT_CLOCK:           {applicationLifecycle, other},
	ledgerv1.Event_EVENT_CALL_REFUSED:    {apiActivity, other},
	ledgerv1.Event_EVENT_QUARANTINE:      {apiActivity, update},
	ledgerv1.Event_EVENT_RENEWAL_ORDERED: {apiActivity, update},
	ledgerv1.Event_EVENT_ARCHIVED:        {apiActivity, update},
	ledgerv1.Event_EVENT_SIGN_IN:         {authentication, logon},
	ledgerv1.Event_EVENT_STORE_ACCEPTED:  {apiActivity, update},
	ledgerv1.Event_EVENT_STORE_EDITED:    {entityManagement, update},
	ledgerv1.Event_EVENT_WITHDRAWN:       {entityManagement, deactive},
	ledgerv1.Event_EVENT_REVOKED:         {entityManagement, deactive},
	ledgerv1.Event_EVENT_APPROVAL:        {apiActivity, other},
}

// authorityActivities are those of an authority's states; tainted was one, in records
// without the field.
var authorityActivities = map[string]int{"prepared": create, "active": activate, "retiring": deactive, "tainted": disable, "gone": remove}

// severities of outcomes.
var severities = map[ledgerv1.Outcome]int{
	ledgerv1.Outcome_OUTCOME_SUCCESS: 1, // informational
	ledgerv1.Outcome_OUTCOME_REFUSED: 3, // medium
	ledgerv1.Outcome_OUTCOME_ERROR:   4, // high
}

// Format returns e as one OCSF event in JSON. It is an export.Format.
func Format(e ledger.Entry) ([]byte, error) {
	r := e.Record
	complete, err := ledger.FormatJSON(e)
	if err != nil {
		return nil, err
	}
	kind, known := kinds[r.GetEvent()]
	switch {
	case !known:
		kind.activity = other
	case r.GetEvent() == ledgerv1.Event_EVENT_ISSUE && r.GetKind() > ledgerv1.Kind_KIND_FIRST:
		kind.activity = update
	case r.GetEvent() == ledgerv1.Event_EVENT_AUTHORITY && r.GetAuthority().GetTainted() && r.GetAuthority().GetState() != "gone":
		kind.activity = disable
	case r.GetEvent() == ledgerv1.Event_EVENT_AUTHORITY && authorityActivities[r.GetAuthority().GetState()] != 0:
		kind.activity = authorityActivities[r.GetAuthority().GetState()]
	}
	o := object{
		"class_uid": kind.class, "category_uid": kind.class / 1000, "activity_id": kind.activity,
		"type_uid": kind.class*100 + kind.activity, "severity_id": severities[r.GetOutcome()],
		"time": r.GetTime().AsTime().UnixMilli(), "message": export.Title(r),
		"metadata": object{
			"version": Version, "product": product(r), "uid": hex.EncodeToString(e.Hash[:]), "log_name": "ledger",
			"event_code": ledger.EventName(r.GetEvent()), "log_version": strconv.FormatUint(uint64(r.GetVersion()), 10),
			"sequence": e.Index,
		},
		"unmapped": json.RawMessage(complete),
	}
	if kind.activity == other {
		o["activity_name"] = ledger.EventName(r.GetEvent())
	}
	metadata := o["metadata"].(object) // made above
	set(metadata, "correlation_uid", r.GetRequestId())
	set(metadata, "log_provider", r.GetCaInstance())
	switch r.GetOutcome() {
	case ledgerv1.Outcome_OUTCOME_SUCCESS:
		o["status_id"] = successID
	case ledgerv1.Outcome_OUTCOME_REFUSED, ledgerv1.Outcome_OUTCOME_ERROR:
		o["status_id"] = failureID
	default:
	}
	set(o, "status_code", r.GetReason())
	set(o, "status_detail", r.GetDetail())
	if t := r.GetTook(); t != nil {
		o["duration"] = t.AsDuration().Milliseconds()
	}
	if s := r.GetSummary(); s != nil {
		o["count"] = s.GetCount()
		o["start_time"] = s.GetSince().AsTime().UnixMilli()
	}
	describe(o, kind.class, r)
	line, err := json.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("format ledger record %d: %w", e.Index, err)
	}
	return visible(line), nil
}

// describe adds what the class has besides.
func describe(o object, class int, r *ledgerv1.Record) {
	switch class {
	case entityManagement:
		o["entity"] = entity(r)
		if e := endpoint(r); e != nil {
			o["src_endpoint"] = e
		}
		if a := actor(r); a != nil {
			o["actor"] = a
		}
	case authentication:
		o["user"] = named("the node", r.GetNode().GetId(), r.GetSpiffeId())
		o["service"] = object{"name": "meshid ca"}
		o["is_remote"] = true
		o["auth_protocol_id"], o["auth_protocol"] = other, "node attestation"
		if in := r.GetSignIn(); in != nil {
			o["user"], o["service"] = named("unknown", r.GetActor()), object{"name": "meshid console"}
			o["auth_protocol"] = in.GetMethod()
			if in.GetMethod() == "oidc" {
				o["auth_protocol_id"], o["auth_protocol"] = openID, "OpenID"
			}
		}
		if e := endpoint(r); e != nil {
			o["src_endpoint"] = e
		}
		if c := r.GetCertificate(); len(c.GetSerial()) > 0 {
			o["certificate"] = certificate(r, c)
		}
	case applicationLifecycle:
		o["app"] = product(r)
	case apiActivity:
		if o["actor"] = actor(r); o["actor"] == nil || r.GetActor() == "" {
			o["actor"] = object{"app_name": "unknown"}
		}
		operation := r.GetCall()
		if operation == "" {
			operation = ledger.EventName(r.GetEvent())
		}
		o["api"] = object{"operation": operation, "service": object{"name": "meshid ca"}}
		if e := endpoint(r); e != nil {
			o["src_endpoint"] = e
		} else {
			o["src_endpoint"] = object{"name": "admin API"}
		}
		if name := r.GetEntry().GetName(); name != "" {
			o["resources"] = []object{{"name": name, "type": "registration entry", "version": strconv.FormatUint(r.GetEntry().GetRevision(), 10)}}
		}
		if a := r.GetArchive(); a != nil {
			o["resources"] = []object{{"name": a.GetFolder(), "type": "ledger archive", "version": fmt.Sprintf("%d-%d", a.GetFirst(), a.GetEnd())}}
		}
	default:
	}
}

// entity is what the event is about.
func entity(r *ledgerv1.Record) object {
	switch r.GetEvent() {
	case ledgerv1.Event_EVENT_ENTRY_LOADED:
		p := named("registration entry", r.GetEntry().GetName())
		p["type"], p["version"] = "registration entry", strconv.FormatUint(r.GetEntry().GetRevision(), 10)
		return p
	case ledgerv1.Event_EVENT_AUTHORITY:
		p := named("authority", r.GetAuthority().GetId())
		p["type"] = "authority"
		return p
	case ledgerv1.Event_EVENT_BUNDLE:
		p := named("trust bundle", r.GetTrustDomain())
		p["type"], p["version"] = "trust bundle", strconv.FormatUint(r.GetBundle().GetSequence(), 10)
		return p
	case ledgerv1.Event_EVENT_EVICT, ledgerv1.Event_EVENT_BAN, ledgerv1.Event_EVENT_UNBAN:
		p := named("node", r.GetNode().GetId())
		p["type"] = "node"
		return p
	case ledgerv1.Event_EVENT_STORE_EDITED:
		if q := r.GetQuarantine(); q != nil {
			p := named("quarantine", q.GetSpiffeId(), hex.EncodeToString(q.GetKeySha256()), hex.EncodeToString(q.GetSerial()))
			p["type"] = "quarantine"
			return p
		}
		p := named("node", r.GetNode().GetId())
		p["type"] = "node"
		return p
	default:
		p := named("X.509-SVID", r.GetSpiffeId())
		p["type"] = "X.509-SVID"
		if c := r.GetCertificate(); len(c.GetSerial()) > 0 {
			p["uid"] = hex.EncodeToString(c.GetSerial())
			p["data"] = certificate(r, c)
		}
		return p
	}
}

// named is an object with the first name that is not empty.
func named(otherwise string, names ...string) object {
	for _, n := range names {
		if n != "" {
			return object{"name": n}
		}
	}
	return object{"name": otherwise}
}

// product is the CA as a program.
func product(r *ledgerv1.Record) object {
	p := object{"name": "meshid ca", "vendor_name": "meshid"}
	set(p, "version", r.GetCaVersion())
	return p
}

// actor is who asked, or nil.
func actor(r *ledgerv1.Record) any {
	if r.GetActor() != "" {
		return object{"user": object{"name": r.GetActor()}}
	}
	if id := r.GetNode().GetId(); id != "" {
		return object{"user": object{"name": id}}
	}
	return nil
}

// endpoint is where the node or the browser calls from, or nil.
func endpoint(r *ledgerv1.Record) any {
	n := r.GetNode()
	e := object{}
	set(e, "name", n.GetId())
	if a, err := netip.ParseAddrPort(cmp.Or(n.GetAddress(), r.GetSignIn().GetAddress())); err == nil {
		e["ip"], e["port"] = a.Addr().Unmap().WithZone("").String(), int(a.Port())
	}
	if len(e) == 0 {
		return nil
	}
	return e
}

// certificate is c as the schema's object.
func certificate(r *ledgerv1.Record, c *ledgerv1.Certificate) object {
	o := object{"serial_number": hex.EncodeToString(c.GetSerial()), "issuer": "authority " + r.GetAuthority().GetId()}
	if h := c.GetSha256(); len(h) > 0 {
		o["fingerprints"] = []object{{"algorithm_id": 3, "algorithm": "SHA-256", "value": hex.EncodeToString(h)}}
	}
	moment(o, "created_time", c.GetNotBefore())
	moment(o, "expiration_time", c.GetNotAfter())
	return o
}

// moment sets a time in milliseconds since 1970, if there is one.
func moment(o object, key string, t *timestamppb.Timestamp) {
	if t != nil {
		o[key] = t.AsTime().UnixMilli()
	}
}

// set sets a string that is not empty.
func set(o object, key, value string) {
	if value != "" {
		o[key] = value
	}
}

// visible escapes what does not print: in JSON, that is in strings only.
func visible(line []byte) []byte {
	if strings.IndexFunc(string(line), func(r rune) bool { return !strconv.IsPrint(r) }) < 0 {
		return line
	}
	b := make([]byte, 0, len(line)+64)
	for _, r := range string(line) {
		switch {
		case strconv.IsPrint(r):
			b = utf8.AppendRune(b, r)
		case r > 0xffff:
			b = fmt.Appendf(b, `\u%04x\u%04x`, 0xd800+(r-0x10000)>>10, 0xdc00+(r-0x10000)&0x3ff)
		default:
			b = fmt.Appendf(b, `\u%04x`, r)
		}
	}
	return b
}
