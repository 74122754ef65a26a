package kube

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMirror(t *testing.T) {
	type value struct{ Key, Text string }
	changes := 0
	m := NewMirror(func(v value) string { return v.Key }, func(a, b value) bool { return a.Text == b.Text }, func() { changes++ })
	m.Replace([]value{{"a", "1"}, {"b", "2"}})
	m.Set(value{"c", "3"})
	m.Set(value{"c", "3"}) // no change
	m.Set(value{"b", "4"})
	m.Delete(value{"a", "1"})
	if diff := cmp.Diff(map[string]value{"b": {"b", "4"}, "c": {"c", "3"}}, m.All()); diff != "" {
		t.Error(diff)
	}
	if changes != 4 {
		t.Errorf("%d changes", changes)
	}
	m.All()["x"] = value{}
	if got := m.Get("x"); got != (value{}) || len(m.All()) != 2 {
		t.Error("what is returned is not a copy")
	}
	m.Replace(nil)
	if len(m.All()) != 0 {
		t.Errorf("after nothing is left: %v", m.All())
	}
}
