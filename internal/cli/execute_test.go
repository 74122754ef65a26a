package cli

import (
	"bytes"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// A misspelt command is an error at every depth, never a page of help and a success.
func TestExecute(t *testing.T) {
	for _, tc := range []struct {
		args string
		want string // in the error; none if ""
		ran  string
	}{
		{args: "entry apply -f x", ran: "apply"},
		{args: "entry --ca host apply -f x", ran: "apply"},
		{args: "entry aply -f x", want: `unknown command "aply" for "ca entry"; did you mean "apply"?`},
		{args: "entry --ca host aply", want: `unknown command "aply" for "ca entry"`},
		{args: "entry zzz", want: "Its commands: ca entry --help"},
		{args: "entri apply", want: `unknown command "entri" for "ca"`},
		{args: "entry --bogus", want: "unknown flag: --bogus"},
		{args: "entry --ca", want: "flag needs an argument"},
		{args: "entry"},
		{args: "entry --help"},
		{args: "entry apply --help"},
		{args: "help entry"},
		{args: "completion bash"},
		{args: "entry apply e.yaml", want: `ca entry apply takes no arguments, and "e.yaml" is one: name a file with -f`},
		{args: "entry list e.yaml", want: `ca entry list takes no arguments, and "e.yaml" is one` + "\n"},
		{args: "entry delete", want: "requires at least 1 arg"},
		{args: "entry delete a b", ran: "delete a b"},
		{args: "entry show a b", want: "accepts at most 1 arg"},
	} {
		var ran string
		leaf := func(use string, check cobra.PositionalArgs) *cobra.Command {
			return &cobra.Command{Use: use, Args: check, RunE: func(_ *cobra.Command, args []string) error {
				ran = strings.Join(append([]string{use}, args...), " ")
				return nil
			}}
		}
		root := &cobra.Command{Use: "ca", SilenceErrors: true, SilenceUsage: true}
		entry := &cobra.Command{Use: "entry"}
		entry.PersistentFlags().String("ca", "", "")
		apply := leaf("apply", cobra.NoArgs)
		apply.Flags().StringP("file", "f", "", "")
		entry.AddCommand(apply, leaf("list", cobra.NoArgs), leaf("delete", cobra.MinimumNArgs(1)), leaf("show", cobra.MaximumNArgs(1)))
		root.AddCommand(entry)
		err := Execute(t.Context(), root, strings.Fields(tc.args), nil, &bytes.Buffer{}, &bytes.Buffer{})
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s: %v", tc.args, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: %v, want %q", tc.args, err, tc.want)
		case ran != tc.ran:
			t.Errorf("%s: ran %q, want %q", tc.args, ran, tc.ran)
		}
	}
}
