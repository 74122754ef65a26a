package export

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Filter says which records are exported. The zero value lets all pass.
type Filter struct {
	events   []ledgerv1.Event   // none is all
	outcomes []ledgerv1.Outcome // none is all
}

// NewFilter returns a filter for records that have one of the events and one of
// the outcomes; no names are all. An error is a *SettingError.
func NewFilter(events, outcomes []string) (Filter, error) {
	var f Filter
	for _, name := range events {
		v, err := number(ledgerv1.Event(0).Descriptor(), "events", name)
		if err != nil {
			return Filter{}, err
		}
		f.events = append(f.events, ledgerv1.Event(v))
	}
	for _, name := range outcomes {
		v, err := number(ledgerv1.Outcome(0).Descriptor(), "outcomes", name)
		if err != nil {
			return Filter{}, err
		}
		f.outcomes = append(f.outcomes, ledgerv1.Outcome(v))
	}
	return f, nil
}

// Match says whether a record passes.
func (f Filter) Match(r *ledgerv1.Record) bool {
	return (len(f.events) == 0 || slices.Contains(f.events, r.GetEvent())) &&
		(len(f.outcomes) == 0 || slices.Contains(f.outcomes, r.GetOutcome()))
}

// number returns the value of an enum that has this name.
func number(enum protoreflect.EnumDescriptor, setting, name string) (protoreflect.EnumNumber, error) {
	var names []string
	for i := range enum.Values().Len() {
		v := enum.Values().Get(i)
		if v.Number() == 0 {
			continue
		}
		n := short(enum, v)
		if n == name {
			return v.Number(), nil
		}
		names = append(names, n)
	}
	return 0, Bad(setting, "%q is none of %s", name, strings.Join(names, ", "))
}

// short is how a value of an enum is called outside of protobuf: EVENT_ISSUE of
// Event is "issue".
func short(enum protoreflect.EnumDescriptor, v protoreflect.EnumValueDescriptor) string {
	return strings.ToLower(strings.TrimPrefix(string(v.Name()), strings.ToUpper(string(enum.Name()))+"_"))
}
