package identity

import (
	"math"
	"math/rand/v2"
	"testing"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/ext"
)

// The functions of texts give what CEL's own extension gives, in each of their forms, for
// texts of several alphabets and positions within and outside of them: a value, or an
// error where it has one.
func TestTextFunctions(t *testing.T) {
	rounds := 20_000
	if testing.Short() {
		rounds = 2_000
	}
	expressions := []string{
		"s.charAt(i)", "s.indexOf(p)", "s.indexOf(p, i)", "s.lastIndexOf(p)", "s.lastIndexOf(p, i)",
		"l.join()", "l.join(p)", "d.join()", "d.join(p)", "s.lowerAscii()", "s.upperAscii()",
		"s.replace(p, q)", "s.replace(p, q, i)", "s.split(p)", "s.split(p, i)",
		"s.substring(i)", "s.substring(i, j)", "s.trim()",
	}
	compile := func(o ...cel.EnvOption) (all []cel.Program) {
		e, err := cel.NewEnv(append(o,
			cel.Variable("s", cel.StringType), cel.Variable("p", cel.StringType), cel.Variable("q", cel.StringType),
			cel.Variable("i", cel.IntType), cel.Variable("j", cel.IntType),
			cel.Variable("l", cel.ListType(cel.StringType)), cel.Variable("d", cel.DynType))...)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range expressions {
			checked, issues := e.Compile(x)
			if issues.Err() != nil {
				t.Fatal(issues.Err())
			}
			p, err := e.Program(checked)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, p)
		}
		return all
	}
	ours, theirs := compile(textFunctions()...), compile(ext.Strings(ext.StringsVersion(2)))
	letters := []rune("aabAZz@[`{ \u00a0\t/ßİıé\u0301語🙂\ufffd")
	positions := []int64{math.MinInt64, math.MaxInt64, math.MaxInt32, 100}
	rng := rand.New(rand.NewPCG(1, 2))
	text := func(most int) string {
		s := make([]rune, rng.IntN(most+1))
		for n := range s {
			s[n] = letters[rng.IntN(len(letters))]
		}
		return string(s)
	}
	position := func() int64 {
		if rng.IntN(20) == 0 {
			return positions[rng.IntN(len(positions))]
		}
		return int64(rng.IntN(12) - 2)
	}
	values, failures := 0, 0
	for range rounds {
		list := []string{text(3), text(3)}[:rng.IntN(3)]
		facts := map[string]any{
			"s": text(8), "p": text(2), "q": text(2), "i": position(), "j": position(), "l": list, "d": []any{list, text(2), []any{text(1), 1}, 7}[rng.IntN(4)],
		}
		for n, x := range expressions {
			got, _, gotErr := ours[n].Eval(facts)
			want, _, wantErr := theirs[n].Eval(facts)
			switch {
			case (gotErr == nil) != (wantErr == nil):
				t.Fatalf("%s with %v: %v, want %v", x, facts, gotErr, wantErr)
			case wantErr != nil:
				failures++
			case got.Type() != want.Type() || got.Equal(want) != types.True:
				t.Fatalf("%s with %v: %v, want %v", x, facts, got, want)
			default:
				values++
			}
		}
	}
	if values < rounds || failures < rounds {
		t.Errorf("%d values and %d errors were compared", values, failures)
	}
}
