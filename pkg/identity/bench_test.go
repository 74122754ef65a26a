package identity

import (
	"fmt"
	"testing"
)

func BenchmarkNewFacts(b *testing.B) {
	node, workload := shopNode(), shopWorkload()
	b.ReportAllocs()
	for b.Loop() {
		NewFacts(node, workload)
	}
}

func BenchmarkMatchWorkload(b *testing.B) {
	e, f := mustCompile(b, shop()), shopFacts()
	b.ReportAllocs()
	for b.Loop() {
		e.MatchWorkload(f)
	}
}

func BenchmarkMatchNode(b *testing.B) {
	e, f := mustCompile(b, shop()), shopFacts()
	b.ReportAllocs()
	for b.Loop() {
		e.MatchNode(f)
	}
}

func BenchmarkRender(b *testing.B) {
	e, f := mustCompile(b, shop()), shopFacts()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := e.Render(f); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkDecide is all that the issuing path does for one SVID.
func BenchmarkDecide(b *testing.B) {
	e, node, workload := mustCompile(b, shop()), shopNode(), shopWorkload()
	b.ReportAllocs()
	for b.Loop() {
		f := NewFacts(node, workload)
		if !e.MatchNode(f) || !e.MatchWorkload(f) {
			b.Fatal("no match")
		}
		if _, err := e.Render(f); err != nil {
			b.Fatal(err)
		}
	}
}

// entries makes so many entries of different teams.
func entries(tb testing.TB, n int) []*Entry {
	list := make([]*Entry, n)
	for i := range list {
		p := shop()
		p.Name = fmt.Sprintf("shop-%d", i)
		p.Workloads = fmt.Sprintf(`docker.labels["team"] == "team-%d" && docker.image.startsWith("registry.internal/shop/")`, i)
		list[i] = mustCompile(tb, p)
	}
	return list
}

func BenchmarkSet10000(b *testing.B) {
	list := entries(b, 10_000)
	set := NewSet(list...)
	w := shopWorkload()
	w.Docker.Labels["team"] = "team-77"
	f := NewFacts(shopNode(), w)
	b.Run("MatchWorkload", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if len(set.MatchWorkload(f)) != 1 {
				b.Fatal("no match")
			}
		}
	})
	b.Run("MatchNode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if len(set.MatchNode(f)) != 10_000 {
				b.Fatal("no match")
			}
		}
	})
	b.Run("With", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			set.With(list[5:6], []string{"shop-9"})
		}
	})
	b.Run("NewSet", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			NewSet(list...)
		}
	})
}

func BenchmarkCompile(b *testing.B) {
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		p := shop()
		p.Workloads = fmt.Sprintf(`docker.labels["team"] == "t%d" && docker.image.startsWith("registry.internal/shop/")`, i)
		if _, err := Compile(exampleOrg, p); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

func BenchmarkParseID(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseID("spiffe://example.org/ns/prod/app/web"); err != nil {
			b.Fatal(err)
		}
	}
}
