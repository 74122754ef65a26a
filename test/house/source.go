// Package house holds the rules of this repository that are not a linter's:
// which package may import which, what every package says of itself, which names
// and calls do not occur. It answers "is the work tree as docs/architecture.md
// says"; it knows source text only, and runs nothing.
package house

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Module is the path of the module.
const Module = "github.com/meshid/meshid"

// File is a Go file of the work tree.
type File struct {
	// Path is relative to the root of the work tree, with slashes.
	Path string
	*ast.File
	Set *token.FileSet
}

// Package returns the file's folder, relative to the root of the work tree.
func (f *File) Package() string {
	if i := strings.LastIndexByte(f.Path, '/'); i >= 0 {
		return f.Path[:i]
	}
	return "."
}

// Test says whether only `go test` compiles the file.
func (f *File) Test() bool { return strings.HasSuffix(f.Path, "_test.go") }

// Generated says whether a tool wrote the file.
func (f *File) Generated() bool { return ast.IsGenerated(f.File) }

// Imports says whether the file imports a package.
func (f *File) Imports(path string) bool {
	for _, i := range f.File.Imports {
		if strings.Trim(i.Path.Value, `"`) == path {
			return true
		}
	}
	return false
}

// Position says where something stands, for an error message.
func (f *File) Position(p token.Pos) string {
	at := f.Set.Position(p)
	at.Filename = f.Path
	return at.String()
}

// skipped are folders that hold no source of ours.
var skipped = map[string]bool{".git": true, ".cache": true, ".up": true, "bin": true, "testdata": true, "node_modules": true}

// Walk calls visit for each file of the work tree at root that is source, with
// its path relative to root.
func Walk(root string, visit func(path string) error) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // somebody's temporary file
			}
			return err
		}
		if d.IsDir() {
			if path != root && skipped[d.Name()] {
				return filepath.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() {
			return nil
		}
		relative, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		return visit(filepath.ToSlash(relative))
	})
}

// Parse parses all Go files of the module at root; nested modules are not part
// of it.
func Parse(root string) ([]*File, error) {
	set := token.NewFileSet()
	var files []*File
	err := Walk(root, func(path string) error {
		if !strings.HasSuffix(path, ".go") || strings.HasPrefix(path, "tools/") {
			return nil
		}
		text, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(path)))
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(set, path, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		files = append(files, &File{Path: path, File: f, Set: set})
		return nil
	})
	return files, err
}
