package house

//go:generate sh -c "cd ../.. && mkdir -p docs && go run ./test/house/coverage > docs/coverage.md.new && mv docs/coverage.md.new docs/coverage.md"
