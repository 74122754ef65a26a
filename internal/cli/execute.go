package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// Execute runs the command of a program that args name. A word that is no command,
// at whatever depth, and an argument that a command does not take are errors: a
// script that misspells "apply" must not go on.
func Execute(ctx context.Context, root *cobra.Command, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := unknownCommand(root, args); err != nil {
		return err
	}
	explainArguments(root)
	return root.ExecuteContext(ctx)
}

// unknownCommand returns an error if args name a group of commands and a word
// that is none of them. Cobra shows the group's help then, and calls that a success.
func unknownCommand(root *cobra.Command, args []string) error {
	group, rest, err := root.Find(args)
	if err != nil || group.Runnable() {
		return nil //nolint:nilerr // cobra finds the same, and says so
	}
	strict := group.FParseErrWhitelist
	group.FParseErrWhitelist.UnknownFlags = true // they are of the command that was meant
	err = group.ParseFlags(rest)
	group.FParseErrWhitelist = strict
	if err != nil || group.Flags().NArg() == 0 {
		return nil //nolint:nilerr // cobra says what is wrong with the flags, or shows the help
	}
	word := group.Flags().Arg(0)
	group.SuggestionsMinimumDistance = 2 // letters that may differ
	message := fmt.Sprintf("unknown command %q for %q", word, group.CommandPath())
	if like := group.SuggestionsFor(word); len(like) > 0 {
		message += fmt.Sprintf("; did you mean %q?", like[0])
	}
	return fmt.Errorf("%s\n  Its commands: %s --help", message, group.CommandPath())
}

// explainArguments has commands that take no arguments say that, where cobra calls
// an argument an unknown command.
func explainArguments(c *cobra.Command) {
	for _, sub := range c.Commands() {
		explainArguments(sub)
	}
	check := c.Args
	if check == nil || c.HasSubCommands() {
		return
	}
	c.Args = func(cmd *cobra.Command, args []string) error {
		err := check(cmd, args)
		if unknown := cobra.NoArgs(cmd, args); err == nil || unknown == nil || err.Error() != unknown.Error() {
			return err
		}
		message := fmt.Sprintf("%s takes no arguments, and %q is one", cmd.CommandPath(), args[0])
		if cmd.Flags().Lookup("file") != nil {
			message += ": name a file with -f"
		}
		return fmt.Errorf("%s\n  Its flags: %s --help", message, cmd.CommandPath())
	}
}
